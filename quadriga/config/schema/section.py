"""The base class of all tables (frozen, strictly typed, no unknown keys), and the types of values.

The string under a field is its only documentation. `--help`, the JSON Schema and `docs/configuration.md` read it from
the source on demand, so a training start does not spend time on it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from quadriga import limits


class Section(BaseModel):
    """One TOML table. Attribute names are the keys. Sections are immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _not_zero(amount: int) -> int:
    if amount == 0:
        raise ValueError("0 is not allowed")
    return amount


Count = Annotated[int, Field(ge=1, le=limits.COUNT)]
TokenCount = Annotated[int, Field(ge=1, le=limits.TRAINING_TOKENS)]
Amount = Annotated[int, Field(ge=0, le=limits.COUNT)]
# The title replaces the generated text of allowed values.
Overlap = Annotated[int, Field(ge=0, le=1, title="0 (torchtitan's windows) or 1 (each token is a label once)")]
Layers = Annotated[int, Field(ge=1, le=limits.LAYERS)]
Width = Annotated[int, Field(ge=1, le=limits.MODEL_WIDTH)]
Rows = Annotated[int, Field(ge=1, le=limits.VOCABULARY)]
Seconds = Annotated[int, Field(ge=1, le=limits.SECONDS)]
Degree = Annotated[int, Field(ge=1, le=limits.DEGREE)]
NewestOrStep = Annotated[int, Field(ge=-1, le=limits.COUNT)]
AllOrCount = Annotated[int, AfterValidator(_not_zero), Field(ge=-1, le=limits.COUNT)]
AllOrDegree = Annotated[int, AfterValidator(_not_zero), Field(ge=-1, le=limits.DEGREE)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Names = tuple[Name, ...]
