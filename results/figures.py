"""The figures of analyse.py, as PNG files, by matplotlib. Readable in grey: lines differ in style or marker too."""
import io

from l2l_adv import write_whole

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    plt = None

STYLES = {"pgd eps/8": "C0:", "pgd eps/4": "C0-", "pgd eps/2": "C0--", "line search": "C2-s", "momentum eps/8": "C1:x",
          "momentum eps/4": "C1-x", "momentum eps/2": "C1--x", "momentum eps": "C1-.x", "learned": "k-o", "sharp": "k--^"}


def panels(rows, columns, width=3.3, height=3.4):
    return plt.subplots(rows, columns, figsize=(max(width * columns, 6), height * rows + 0.7), squeeze=False,
                        layout="constrained")


def save_figure(figure, title, path):
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    write_whole(path, png.getvalue())
    plt.close(figure)
    print(path)


def draw_steps(by_run, about, folder):
    figure, (axes,) = panels(1, len(by_run))
    for ax, (label, result) in zip(axes, by_run.items()):
        top, T = max(result["after 100"].values()), len(result["by step"]["line search"]) - 1
        for name, losses in result["by step"].items():
            ax.plot(range(T + 1), [100 * loss / top for loss in losses], STYLES[name], markersize=4, label=name)
        highest = 100 * max(top, *map(max, result["by step"].values())) / top
        gap = highest - 100 * min(losses[T] for losses in result["by step"].values()) / top
        ax.set(title=f"{label}, {result['loss']}", xlabel="gradients t", xticks=range(0, T + 1, 2),
               ylim=(max(0, highest - 3.5 * gap), highest + 0.2 * gap))  # the climb's upper part, where the attacks part
        ax.title.set_fontsize(10)
    axes[0].set_ylabel("inner loss, % of the highest after 100 gradients")
    handles = [ax.get_legend_handles_labels() for ax in axes]
    figure.legend(*max(handles, key=lambda pair: len(pair[1])), loc="outside right center", fontsize=8)
    save_figure(figure, f"How fast each attack climbs the inner loss\n{about}", folder / "inner-loss.png")


def draw_training(logs, folder):
    figure, axes = panels(2, len(logs), height=2.8)
    styles = [{"natural": "k-o", "pgd-10": "C0--s"}, {"loss": "k-o", "pgd-10 loss": "C0--s", "learned-10 loss": "C1:^"}]
    for column, (label, log) in zip(axes.T, logs.items()):
        for ax, style_of, scale in zip(column, styles, (100, 1)):
            for key in style_of:
                points = [(row["epoch"], scale * row[key]) for row in log if key in row]
                if points:
                    ax.plot(*zip(*points), style_of[key], markersize=4, label=key)
                    ax.legend(fontsize=8)
            ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        column[0].set(title=label, ylim=(0, 100))
        column[1].set(xlabel="epoch")
    axes[0, 0].set_ylabel("held-out accuracy in %")
    axes[1, 0].set_ylabel("outer loss, and inner after 10 steps")
    save_figure(figure, "Training, epoch by epoch", folder / "training.png")


def draw_images(rows, about, folder):
    """rows: (name, images (n, C, H, W), n captions)."""
    figure, axes = panels(len(rows), len(rows[0][1]), width=1.1, height=1.15)
    for line, (name, shown, classes) in zip(axes, rows):
        for ax, image, label in zip(line, shown.cpu().clamp(0, 1), classes):
            ax.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy())  # (H, W, 3), grey or colour
            ax.set_title(label, fontsize=9)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    save_figure(figure, "True class, and each classifier's answer to its own attack\n(difference: black -eps, "
                f"white +eps)\n{about}", folder / "images.png")


def draw_surfaces(surfaces, shares, how_many, about, folder):
    """surfaces: {label: loss, row b and column a}; shares: the values of a and b, in units of eps."""
    figure, (axes,) = panels(1, len(surfaces))
    for ax, (label, loss) in zip(axes, surfaces.items()):
        ax.contourf(shares, shares, loss, 12, cmap="Greys", alpha=0.6)
        ax.clabel(ax.contour(shares, shares, loss, 12, colors="k", linewidths=0.7), fontsize=7)
        ax.plot([1, 0, -1, 0, 1], [0, 1, 0, -1, 0], "C1--", linewidth=2.5)  # |a| + |b| = 1: where the signs agree, eps
        ax.set(title=label, xlabel="along sign(g), in eps", aspect="equal")
    axes[0].set_ylabel("along a random sign, in eps")
    save_figure(figure, f"Mean cross-entropy of {how_many} around x; dashed: the eps-ball\n"
                f"{about}", folder / "surface.png")
