"""l2l_adv.py whose `train` keeps every epoch's weights, as runs OUT/epoch-01 … that the other scripts here can read.

    python3 results/keep.py train --method rnn-adv --dataset cifar10 --model small --out runs/kept
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import l2l_adv


class KeepingTraining(l2l_adv.Training):
    def save(self):
        super().save()
        out = Path(self.settings.out)
        kept = out / f"epoch-{len(self.rows):02}"
        kept.mkdir(exist_ok=True)
        l2l_adv.write_whole(kept / "best.pt", (out / "last.pt").read_bytes())


if __name__ == "__main__":
    l2l_adv.Training = KeepingTraining
    sys.exit(l2l_adv.main())
