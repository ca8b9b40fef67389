"""The style sheet of a page: light or dark by the setting of the reader's system, and light in print.

The colours of data are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which are distinguishable with any
common colour blindness, in one set for light and one for dark backgrounds. Yellow is not used: it is hardly visible on
white.
"""

from __future__ import annotations

LIGHT = {
    "text": "#1c1f23", "muted": "#5a6068", "ground": "#ffffff", "raised": "#f4f5f7", "line": "#d5d8dc",
    "warn": "#8a3b00", "warn-ground": "#fff3e6",
}  # fmt: skip
DARK = {
    "text": "#e7e9ec", "muted": "#a3aab3", "ground": "#16181b", "raised": "#22262b", "line": "#3b4148",
    "warn": "#ffb37a", "warn-ground": "#33241a",
}  # fmt: skip
#            blue       vermilion  green      orange     sky        purple     grey
ON_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9", "#b0568c", "#a7adb4")
ON_DARK = ("#3d9bdc", "#f0813a", "#25b88d", "#f2b632", "#9ad4f5", "#dd9cc2", "#6d757e")
BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, GREY = range(len(ON_LIGHT))

CSS_RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; color: var(--text); background: var(--ground);
       font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; }
.source, .note, figcaption { color: var(--muted); font-size: .88rem; overflow-wrap: anywhere; }
.answer { background: var(--raised); border-left: 4px solid var(--d0); padding: .7rem 1rem; margin: 1.1rem 0; }
.answer p { margin: .25rem 0; }
.answer p:first-child { font-size: 1.15rem; font-weight: 600; }
.warnings { background: var(--warn-ground); color: var(--warn); padding: .6rem 1rem; margin: 1rem 0; }
.warnings ul { margin: .2rem 0; padding-left: 1.2rem; }
.missing { color: var(--muted); font-style: italic; }
figure { margin: 1rem 0 1.6rem; }
figcaption { margin: .3rem 0 .5rem; }
svg.picture { display: block; width: 100%; min-width: 38rem; height: auto; }
svg.picture text { font-size: 13px; fill: var(--text); }
svg.picture text.small { font-size: 11.5px; fill: var(--muted); }
svg.picture .grid { stroke: var(--line); stroke-width: 1; }
svg.picture .axis { stroke: var(--muted); stroke-width: 1.2; }
svg.picture .stream { fill: var(--raised); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; margin: .4rem 0; }
.legend li { font-size: .88rem; display: flex; align-items: center; gap: .4rem; max-width: none; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; min-width: 18rem; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding: .2rem 0 .3rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { border-bottom: 2px solid var(--muted); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; }
td, thead th { white-space: nowrap; }
.left { text-align: left; }
td.left, th.left, .missing { white-space: normal; overflow-wrap: break-word; }
.left { min-width: 4.6rem; max-width: 24rem; }
td.left { min-width: 7.5rem; }
thead th.left { white-space: nowrap; }
summary { cursor: pointer; color: var(--muted); font-size: .88rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .answer { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  svg.picture { min-width: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def style_sheet() -> str:
    light, dark = _variables(LIGHT, ON_LIGHT), _variables(DARK, ON_DARK)
    marks = "".join(
        f".fill{i} {{ fill: var(--d{i}); }} .line{i} {{ stroke: var(--d{i}); fill: none; stroke-width: 2; }}\n"
        for i in range(len(ON_LIGHT))
    )
    dark_screen = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return f":root {{ color-scheme: light dark; {light} }}\n{dark_screen}\n{CSS_RULES}{marks}"


def _variables(colours: dict[str, str], data: tuple[str, ...]) -> str:
    named = [f"--{name}: {colour};" for name, colour in colours.items()]
    return " ".join(named + [f"--d{i}: {colour};" for i, colour in enumerate(data)])
