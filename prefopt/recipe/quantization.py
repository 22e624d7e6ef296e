"""How weights are quantized, as a recipe says it: a word, or a mapping with the details."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from prefopt.errors import Problem
from prefopt.recipe.section import Section, Text

QuantizationType = Literal["none", "int8", "nf4", "fp4"]


class QuantizationRecipe(Section):
    """How frozen weights are quantized (bitsandbytes)."""

    type: QuantizationType = "none"
    """The format."""
    double: bool = True
    """Quantize the scales of `nf4` and `fp4` as well, as QLoRA does: 0.37 bit less per weight."""
    skip: Annotated[tuple[Text, ...], Field(strict=False), AfterValidator(lambda names: tuple(sorted(set(names))))] = (
        "lm_head",
    )
    """Modules that stay as they are: full names, or ends of names from a dot on; `lm_head` is the output layer."""
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype that weights are expanded to; `auto` follows `train.precision`."""

    def __str__(self) -> str:
        """Return the mapping as one would write it, without its defaults."""
        keys = [f"type: {self.type}"]
        keys += [f"double: {str(self.double).lower()}"] if not self.double else []
        keys += [f"skip: [{', '.join(self.skip)}]"] if self.skip != ("lm_head",) else []
        keys += [f"compute: {self.compute}"] if self.compute != "auto" else []
        return f"{{{', '.join(keys)}}}"


def _shortest(given: QuantizationType | QuantizationRecipe) -> QuantizationType | QuantizationRecipe:
    """Return the bare word where it says everything, so that two spellings of one quantization are equal."""
    if isinstance(given, str):
        return given
    meaningless = {"none": {"double", "skip", "compute"}, "int8": {"double"}}.get(given.type, set())
    if wrong := ", ".join(sorted(meaningless & given.model_fields_set)):
        named = {"none": "int8, nf4 or fp4 as its type", "int8": "nf4 or fp4, whose scales can be quantized as well"}
        problem = Problem("quantization", f"{named[given.type]}, for {wrong} to mean something", given.type,
                          f"set a type, or remove {wrong}")  # fmt: skip
        raise PydanticCustomError("problems", "meaningless keys", {"problems": [problem]})
    return given.type if given == QuantizationRecipe(type=given.type) else given


def _spelled_out(given: QuantizationType | QuantizationRecipe) -> Any:
    """Return every setting, for the record of a run."""
    details = quantization_details(given)
    if details.type == "none":
        return "none"
    return details.model_dump(mode="json", exclude={"double"} if details.type == "int8" else set())


Quantization = Annotated[
    QuantizationType | QuantizationRecipe, AfterValidator(_shortest), PlainSerializer(_spelled_out)
]
"""A word where the details have their defaults, else a mapping."""


def quantization_details(quantization: QuantizationType | QuantizationRecipe | str) -> QuantizationRecipe:
    """Return a quantization with all its details."""
    if isinstance(quantization, QuantizationRecipe):
        return quantization
    return QuantizationRecipe.model_validate({"type": quantization})
