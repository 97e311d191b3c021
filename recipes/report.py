"""`sparselearn report`: the pictures of one run, or of several side by side, as one HTML file."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparselearn.errors import SparsityError

EXAMPLES = """examples:
  sparselearn report runs/digits-rigl-seed0
  sparselearn report runs/demo/*/ --out report.html --png
  sparselearn report runs/rigl runs/static --layer '*.fc1.weight'
The file is complete in itself: open it in a browser, or mail it. A run that still trains is shown as far as it is.
"""


def report(runs: Sequence[Path], out: Path, *, png: bool = False, layers: Sequence[str] = ()) -> Path:
    """Write one self-contained HTML file about the runs (folders that `sparselearn train` made), and return its path.

    A picture appears where a run has its data: curves of metrics.csv, and pictures of the masks and weights in
    model.pt (last.ckpt of a run that is not finished). All runs share the axes, each with a colour of its own.

    Args:
        png: also write every picture beside `out`, as `<name of out>-<picture>.png`.
        layers: shell patterns of the layers whose masks are drawn; default: the first, the largest and the
            last that are not dense.

    Raises:
        SparsityError: no run was given, a folder is no run, a file of it is missing or damaged, a pattern matches no
            masked layer, `out` cannot be written, matplotlib is not installed.
    """
    if not runs:
        raise SparsityError("`report` needs at least one run: the folder that was the --out of `sparselearn train`.")
    try:
        import matplotlib
    except ImportError as error:
        raise SparsityError("`report` draws with matplotlib: pip install 'sparselearn[recipes]'.") from error
    from sparselearn.recipes import report_page, report_runs, report_style

    out = Path(out)
    if out.is_dir():
        raise SparsityError(f"`--out` must name a file; `{out}` is a folder. Write `{out / 'report.html'}`.")
    read = report_runs.read_runs(runs)
    with matplotlib.rc_context(report_style.STYLE):
        sections = _pictures(read, layers)
        arguments = [*map(str, runs), "--out", str(out), *(["--png"] if png else [])]
        arguments += [word for pattern in layers for word in ("--layer", pattern)]
        text = report_page.page(read, sections, "sparselearn report " + shlex.join(arguments))
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text, encoding="utf-8")
            if png:
                for picture in (picture for pictures in sections.values() for picture in pictures):
                    report_style.png(picture, out.with_name(f"{out.stem}-{picture.slug}.png"))
        except OSError as error:
            raise SparsityError(f"`{out}` cannot be written ({error}). Choose another --out.") from error
    return out


def _pictures(runs: Sequence[Any], layers: Sequence[str]) -> dict[str, list[Any]]:
    """The pictures that these runs have the data for, by section."""
    from sparselearn.recipes import report_curves as curves
    from sparselearn.recipes import report_layers as by_layer
    from sparselearn.recipes import report_masks as masks

    wanted = {
        "Training": [curves.accuracy(runs), curves.loss(runs), curves.cost(runs)],
        "How the masks move": [
            curves.churn(runs), curves.exploration(runs), curves.gradient_norm(runs), curves.densities(runs),
            curves.others(runs),
        ],
        "Where the connections are": [
            masks.fan_out(runs), masks.first_filters(runs), masks.attention(runs),
            masks.masks(runs, masks.choose(runs, layers)),
        ],
        "Layers and weights": [
            by_layer.densities(runs), by_layer.dead(runs), by_layer.histograms(runs), curves.dead_neurons(runs),
        ],
    }  # fmt: skip
    return {heading: [picture for picture in found if picture] for heading, found in wanted.items()}


def add_command(subparsers: Any) -> argparse.ArgumentParser:
    """Add `report` to the subparsers of the `sparselearn` command; `command` runs what it parsed."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="an HTML file with the pictures of one or several runs",
        description="One HTML file with the pictures of one run, or of several side by side.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run (--out of training)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the HTML file (default: report.html)")
    parser.add_argument("--png", action="store_true", help="also write every picture as a PNG beside it")
    parser.add_argument(
        "--layer", action="append", default=[], metavar="PATTERN",
        help="draw the masks of the layers that match (may be repeated; default: the first, the largest, the last)",
    )  # fmt: skip
    return parser


def command(args: argparse.Namespace) -> int:
    """Run `sparselearn report` with the arguments of `add_command`'s parser."""
    print(f"Report: {report(args.runs, args.out, png=args.png, layers=args.layer)}")
    return 0
