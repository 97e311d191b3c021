"""The report's HTML: one file, with its own style, that loads nothing."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from sparselearn.recipes.report_layers import unused
from sparselearn.recipes.report_runs import Run, differences
from sparselearn.recipes.report_style import RUNS, THEME, Picture, svg
from sparselearn.statistics import dead_neurons


def _seconds(value: float) -> str:
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{value:.1f} s"


# Key of the facts, heading, how it is written. A column that no run has is left out.
COLUMNS: list[tuple[str, str, Callable[[Any], str]]] = [
    ("test_accuracy", "Test accuracy", lambda v: f"{100 * v:.2f} %"),
    ("test_loss", "Test loss", lambda v: f"{v:.4f}"),
    ("sparsity", "Sparsity", lambda v: f"{100 * v:.4f} %"),
    ("nnz", "Nonzero", lambda v: f"{v:,}"),
    ("parameters", "Parameters", lambda v: f"{v:,}"),
    ("training_flops", "Training FLOPs", lambda v: f"{v:.3f} × dense"),
    ("size_mb", "Size", lambda v: f"{v:,.3f} MB"),
    ("seconds", "Time", _seconds),
    ("hardware", "Hardware", str),
    ("commit", "Commit", str),
]


def _variables(dark: bool) -> str:
    return "".join(f"--{name}:{night if dark else day};" for day, (name, night) in THEME.items())


STYLE = """
:root{color-scheme:light dark;VARIABLES--page:#f6f7f9;--card:#fff;--warn:#fff6e0;--warnline:#f0c96a}
@media (prefers-color-scheme:dark){:root{DARKER--page:#0e1117;--card:#171b24;--warn:#2d2612;--warnline:#7a6222}
 .plot svg image{filter:brightness(1.35)}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
 "Helvetica Neue","Liberation Sans",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:82rem;margin:0 auto;padding:2.5rem clamp(1rem,3vw,2.5rem) 4rem}
h1{font-size:1.9rem;line-height:1.2;letter-spacing:-.02em;margin:0}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:2.75rem 0 1rem}
h3{font-size:1rem;margin:0}
p{margin:0}
.lead{color:var(--muted);margin-top:.4rem;max-width:60rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.1rem 1.25rem}
.grid{display:grid;grid-auto-flow:dense;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.25rem}
.wide{grid-column:1/-1}
figure{margin:0;display:flex;flex-direction:column}
figcaption{color:var(--muted);font-size:.9rem;margin:.15rem 0 .9rem}
.plot{overflow-x:auto;margin-top:auto}
.plot svg{display:block;width:100%;height:auto}
.plot svg text{font-family:inherit!important}
.plot svg image{image-rendering:pixelated}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .65rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--muted);font-weight:500;font-size:.82rem;white-space:normal;vertical-align:bottom}
tbody th{font-weight:600}
tbody tr:last-child>*{border-bottom:0}
.number{text-align:right}
.name{white-space:normal;min-width:13rem;overflow-wrap:anywhere}
.text{white-space:normal;min-width:7rem;font-size:.82rem;color:var(--muted)}
.small{color:var(--muted);font-weight:400;font-size:.82rem}
.swatch{display:inline-block;width:.75em;height:.75em;border-radius:3px;margin-right:.55em}
.tag{border:1px solid var(--warnline);background:var(--warn);border-radius:99px;padding:.05rem .55rem;font-size:.78rem;
 font-weight:500;margin-left:.5em}
.notes{background:var(--warn);border:1px solid var(--warnline);border-radius:12px;padding:.8rem 1.25rem .8rem 2.4rem;
 margin:1.25rem 0 0}
details{margin-top:1.25rem}
details summary{cursor:pointer;font-weight:600}
details table{margin-top:.8rem}
footer{overflow-wrap:anywhere;color:var(--muted);font-size:.85rem;margin-top:3rem}
@media (max-width:60rem){.grid{grid-template-columns:minmax(0,1fr)}.wide .plot svg{min-width:52rem}}
@media print{body{background:#fff}.card,figure{break-inside:avoid}}
""".replace("VARIABLES", _variables(False)).replace("DARKER", _variables(True))


def page(runs: Sequence[Run], sections: dict[str, list[Picture]], command: str) -> str:
    """The whole file. Sections without pictures are left out."""
    names = ", ".join(run.label for run in runs)
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    lead = "; ".join(dict.fromkeys(f"{r.config.get('name', '?')}: {r.config.get('description') or ''}" for r in runs))
    body = [
        f"<header><h1>{escape(title)}</h1><p class='lead'>{escape(lead.rstrip(': '))}</p></header>",
        _notes(runs),
        f"<section><h2>Results</h2><div class='card scroll'>{_results(runs)}</div></section>",
        _differences(runs),
        *(_section(heading, pictures) for heading, pictures in sections.items() if pictures),
        _layers(runs),
        f"<footer>Made by <code>{escape(command)}</code>. This file needs no network.</footer>",
    ]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(names)} · sparselearn report</title><style>{STYLE}</style></head>\n"
        "<body><main>\n" + "\n".join(part for part in body if part) + "\n</main></body></html>\n"
    )


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before comparing."""
    found = []
    for run in runs:
        if not run.finished:
            steps = run.config.get("max_steps")
            end = f" of {steps:,}" if isinstance(steps, int) else ""
            pictures = "its pictures of masks are of the last checkpoint" if run.weights else "it has no checkpoint yet"
            found.append(f"{run.label} is not finished: logged up to step {run.step:,}{end}; {pictures}.")
        if run.facts.get("diverged"):
            found.append(f"{run.label} diverged: some of its weights are not finite.")
    for key, what in {"name": "recipes", "data": "data", "max_steps": "numbers of steps"}.items():
        values = list(dict.fromkeys(str(run.config.get(key)) for run in runs))
        if len(values) > 1:
            seen = f" ({', '.join(values)})" if key != "data" else ""
            found.append(f"The runs are of different {what}{seen}: compare their numbers with care.")
    if len({str(run.facts.get("hardware")) for run in runs}) > 1:
        found.append("The runs were made on different hardware: their times are not comparable.")
    return found


def _notes(runs: Sequence[Run]) -> str:
    found = notes(runs)
    return f"<ul class='notes'>{''.join(f'<li>{escape(note)}</li>' for note in found)}</ul>" if found else ""


def _swatch(index: int) -> str:
    return f"<span class='swatch' style='background:var(--run{index % len(RUNS)})'></span>"


def _results(runs: Sequence[Run]) -> str:
    """The table of numbers; each cell also has the exact value of the file, as an attribute."""
    columns = [column for column in COLUMNS if any(column[0] in run.facts for run in runs)]
    kind = {key: " class='text'" if text is str else " class='number'" for key, _, text in columns}
    heads = "".join(f"<th scope='col'{kind[key]}>{name}</th>" for key, name, _ in columns)
    rows = []
    for index, run in enumerate(runs):
        about = " · ".join(str(run.config.get(key, "?")) for key in ("name", "variant"))
        tags = [] if run.finished else ["unfinished"]
        tags += ["diverged"] if run.facts.get("diverged") else []
        tag = "".join(f" <span class='tag'>{text}</span>" for text in tags)
        cells = [
            f"<th scope='row' class='name'>{_swatch(index)}{escape(run.label)}{tag}<br>"
            f"<span class='small'>{escape(about)} · seed {escape(str(run.config.get('seed', '?')))}</span></th>"
        ]
        for key, _, text in columns:
            value = run.facts.get(key)
            if value is None:
                cells.append(f"<td{kind[key]}>–</td>")
            else:
                cells.append(
                    f"<td{kind[key]} data-{key.replace('_', '-')}='{escape(str(value))}'>{escape(text(value))}</td>"
                )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = f"<thead><tr><th scope='col'>Run</th>{heads}</tr></thead>"
    return f"<table id='results'>{head}<tbody>{''.join(rows)}</tbody></table>"


def _differences(runs: Sequence[Run]) -> str:
    table = differences(runs)
    if len(runs) < 2 or not table:
        return ""
    heads = "".join(f"<th scope='col'>{_swatch(i)}{escape(run.label)}</th>" for i, run in enumerate(runs))
    rows = "".join(
        f"<tr><th scope='row'><code>{escape(key)}</code></th>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>"
        for key, values in table.items()
    )
    return (
        "<section><h2>What differs between the runs</h2><div class='card scroll'><table><thead><tr>"
        f"<th scope='col'>Setting</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _section(heading: str, pictures: Sequence[Picture]) -> str:
    figures = "\n".join(_figure(picture) for picture in pictures)
    return f"<section><h2>{escape(heading)}</h2><div class='grid'>\n{figures}\n</div></section>"


def _figure(picture: Picture) -> str:
    alt = escape(f"{picture.title}. {picture.alt}")
    kind = "card wide" if picture.wide else "card"
    return (
        f"<figure class='{kind}' id='{picture.slug}'><h3>{escape(picture.title)}</h3>"
        f"<figcaption>{escape(picture.line)}</figcaption>"
        f"<div class='plot' role='img' aria-label='{alt}'>{svg(picture)}</div></figure>"
    )


def _layers(runs: Sequence[Run]) -> str:
    """The exact numbers behind the pictures, folded in."""
    tables = []
    for index, run in enumerate(runs):
        if not run.masks:
            continue
        rows = "".join(
            f"<tr><th scope='row'>{escape(name)}</th><td>{' × '.join(map(str, mask.shape))}</td>"
            f"<td class='number'>{int(mask.sum()):,}</td><td class='number'>{mask.numel():,}</td>"
            f"<td class='number'>{100 * float(mask.float().mean()):.2f} %</td>"
            f"<td class='number'>{dead_neurons(mask):,} of {mask.shape[0]:,}</td>"
            f"<td class='number'>{unused(mask):,} of {mask.shape[1]:,}</td></tr>"
            for name, mask in run.masks.items()
        )
        heads = "".join(
            f"<th scope='col'{'' if place < 2 else ' class=number'}>{name}</th>"
            for place, name in enumerate(
                ("Layer", "Shape", "Active", "Size", "Density", "Dead outputs", "Unused inputs")
            )
        )
        tables.append(
            f"<details class='card'><summary>{_swatch(index)}Layers of {escape(run.label)}</summary>"
            f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>"
        )
    return f"<section><h2>Every layer in numbers</h2>{''.join(tables)}</section>" if tables else ""
