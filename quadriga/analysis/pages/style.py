"""The colours of a page: light or dark by the setting of the reader's system, and light in print (`page.css`).

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
