"""The keys of a recipe: one frozen model per section, one to one with the YAML.

The sentence under a key is its documentation: `docs/recipe.md`, the JSON schema and the error messages are
made from this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from prefopt.recipe.conflicts import OWN_SHAPE, refuse_conflicts
from prefopt.recipe.loss import LossInput, build_loss, normal_loss, written_loss
from prefopt.recipe.quantization import Quantization
from prefopt.recipe.section import Section, Text
from prefopt.recipe.text import dump_yaml

if TYPE_CHECKING:
    from prefopt_losses import Loss

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
ShareOrSteps = Share | Count
Auto = Literal["auto"]


class ModelRecipe(Section):
    """The policy: the model that is trained."""

    path: Text
    """Hub name, folder, or `sandbox` for the embedded small world."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """How the weights are loaded; `auto` follows `train.precision`."""
    quantization: Quantization = "none"
    """Quantize the base weights: a format, or a mapping. Needs an `adapter`: quantized weights cannot be trained."""
    attention: Literal["auto", "shared", "unshared"] = "auto"
    """`shared` encodes a prompt once for all its completions; `unshared` uses one row per completion."""
    attention_backend: Literal["auto", "sdpa", "products", "varlen", "flex"] = "auto"
    """What computes the attention of shared prompts; `auto`: on an accelerator one variable-length flash call, else
    FlexAttention; on a CPU whole matrix products in fp32, with SDPA for rows of more than 1,024 tokens; else SDPA
    prompt by prompt. The first that agrees with the model's plain logits."""
    kernels: bool = False
    """Take norms and activations from the hub's kernels (package `kernels`); needs an accelerator."""


class AdapterRecipe(Section):
    """A small trainable addition; the base weights stay as they are."""

    type: Literal["lora"] = "lora"
    """The kind of adapter."""
    path: Text | None = None
    """Go on training this adapter (folder or hub name), with its own rank, alpha and targets; a frozen copy of it
    is the reference."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the hub."""
    rank: Count = 16
    """Inner dimension of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by `alpha / rank`."""
    dropout: Share = 0.0
    """Dropout in front of the adapter."""
    targets: Literal["all-linear"] | list[Text] = "all-linear"
    """Which layers get an adapter: all linear layers but the head, or a list of module names."""
    merge: bool = False
    """Also write the merged model at the end."""

    @model_serializer(mode="wrap")
    def _only_what_holds(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        mapping: dict[str, Any] = whole(self)
        return {key: value for key, value in mapping.items() if self.path is None or key not in OWN_SHAPE}


class Source(Section):
    """One source of preference data among several."""

    path: Text
    """File, folder, hub name, or `sandbox`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """0.5 takes a random half of its rows, 2 takes every row twice."""
    split: str | None = None
    """Split of this source; where absent, `data.split` to train on, an evaluation split to evaluate on."""
    columns: dict[str, str] = Field(default={})
    """Column names of this source; `data.columns` where absent."""


Sources = Text | Annotated[list[Text | Source], Field(min_length=1)]


class DataRecipe(Section):
    """Preference data: pairs, labelled single completions, or ranked completions."""

    train: Sources
    """File, folder, hub name, `sandbox`, or a list of sources."""
    eval: Sources | None = None
    """Held-out data, written like `train`; where absent, `eval_fraction` of the prompts of `train`."""
    eval_fraction: Share = 0.02
    """Share of the prompts of `train` that is held out where `eval` is absent (the sandbox brings its own)."""
    held_out_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides which prompts are held out; apart from `seed`, so that runs of several seeds are measured on the same."""
    max_length: Count = 2048
    """Longest prompt plus completion, in tokens."""
    truncation: Literal["completion", "prompt", "drop"] = "completion"
    """What gives way in a longer row: the end of the completion, the start of the prompt, or the row."""
    columns: dict[str, str] = Field(default={})
    """The data's own column names, by role: `{chosen: my_best_answer}`; the roles stand in `docs/data.md`."""
    split: str | None = None
    """Split to train on; needed only where the data leave a choice."""
    filter: dict[str, Any] = Field(default={})
    """Keep the rows whose columns fit: a value, a list of values, or `{score: ">= 0.6"}`."""
    group_by_prompt: bool = False
    """Bring the pairs of one prompt together, so that the prompt is computed once for all of them."""
    eos: Literal["auto", "always", "never"] = "auto"
    """Whether a completion ends with end-of-sequence; `auto` adds it where the template does not."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """Whether the tokenizer's chat template is applied; `auto`: to conversations, not to strings."""
    processes: Count | None = None
    """Processes that tokenize; where absent, as many as is sensible for this machine."""


class SyncRecipe(Section):
    """A reference that follows the policy (TR-DPO): every so many steps, ref <- mix * policy + (1 - mix) * ref."""

    every: Count = 512
    """Optimizer steps between two syncs."""
    mix: Annotated[float, Field(gt=0)] = 0.6
    """Share of the policy in the new reference, at most 1; 1 replaces the reference by the policy."""


class ReferenceRecipe(Section):
    """The model that the policy is measured against; paid for once and cached by content."""

    model: Text | None = None
    """Hub name or folder; where absent, the policy's initial weights."""
    revision: str | None = None
    """Branch, tag or commit of `model`."""
    quantization: Quantization = "none"
    """Quantize the reference, a format or a mapping: for building a cache of a model that does not fit."""
    cache: Text = "auto"
    """A folder, `auto` for the shared one of this user, or `off` to compute the reference in every step."""
    max_margin_error: Annotated[float, Field(gt=0)] | None = None
    """Refuse a quantized reference whose error per margin exceeds this, in nats, for more than 5 % of the pairs."""
    token_budget: Auto | Count = "auto"
    """Computed tokens per batch while the cache is built."""
    sync: SyncRecipe | None = None
    """Let the reference follow the policy; it is then computed in every step, for no cache can hold it."""


OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


class OptimizerRecipe(Section):
    """The optimizer."""

    name: OptimizerName = "adamw"
    """AdamW, or its 8-bit and paged forms (bitsandbytes); on a CPU there is nowhere to page to."""
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _located(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class TrainRecipe(Section):
    """How the policy is trained."""

    epochs: Annotated[float, Field(gt=0)] | None = 1.0
    """Passes over the data; absent where `max_steps` is given."""
    max_steps: Count | None = None
    """Optimizer steps, instead of `epochs`."""
    batch_size: Count = 64
    """Comparisons per optimizer step, over all processes and accumulation."""
    token_budget: Auto | Count = "auto"
    """Computed tokens per micro-batch; changes speed and memory, never the result. `auto` is what fits free memory, at
    most 65536 on an accelerator and, on a CPU, what more would make hardly faster (512 to 8192)."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""
    warmup: ShareOrSteps = 0.1
    """A share of the run if below 1, a number of steps if a whole number."""
    precision: Literal["bf16", "fp32", "bf16-pure"] = "bf16"
    """`bf16` is autocast over 32-bit master weights; `bf16-pure` keeps the weights in 16 bit as well."""
    optimizer: Annotated[
        OptimizerRecipe, BeforeValidator(_named, json_schema_input_type=OptimizerName | OptimizerRecipe)
    ] = OptimizerRecipe()
    """The optimizer: a name, or a mapping."""
    dropout: bool = False
    """Whether the model's own dropout is active."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the gradient to this norm; null for no clipping."""
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations in the backward pass to save memory; `auto`: only where the token budget needs it."""
    compile: bool = False
    """Compile the decoder layers (torch.compile); minutes at the start, faster steps on an accelerator."""

    @model_validator(mode="before")
    @classmethod
    def _max_steps_replace_the_default_epochs(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("max_steps") is not None and "epochs" not in section:
            return {**section, "epochs": None}
        return section


class EvalRecipe(Section):
    """What is measured on held-out data, and when."""

    every: ShareOrSteps | None = 0.1
    """A share of the run if below 1, steps if a whole number; 0 or null for only at the end."""
    gold_reward: Literal["sandbox"] | Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`sandbox`, or `module:function` with a function of (prompt, completion) that returns a number."""
    samples: Annotated[int, Field(ge=0)] = 64
    """Prompts for which the policy writes a completion: for KL, length and gold reward."""
    max_new_tokens: Count = 128
    """Longest sampled completion, in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the KL estimate means the policy itself only at 1."""
    show: Annotated[int, Field(ge=0)] = 3
    """Samples printed before and after training."""


class CheckpointRecipe(Section):
    """What is kept of a run while it goes on."""

    every: ShareOrSteps | None = 0.25
    """A share of the run if below 1, steps if a whole number; 0 or null for only at the end."""
    keep: Count = 2
    """Checkpoints kept; older ones are removed."""
    best: Annotated[str, Field(pattern=r"^eval(\.\w+)+$")] | None = None
    """A metric such as `eval.accuracy`: the best checkpoint by it is kept as well."""


class TrackingRecipe(Section):
    """Where metrics go; `metrics.jsonl` is always written."""

    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases."""
    project: Text = "prefopt"
    """Weights & Biases project."""
    tensorboard: bool = False
    """Also write TensorBoard events."""
    every: Count = 1
    """Log every so many steps."""


class Recipe(Section):
    """One run."""

    model: Annotated[ModelRecipe, BeforeValidator(_located, json_schema_input_type=ModelRecipe | str)]
    """The policy: hub name, folder, `sandbox`, or a mapping."""
    adapter: AdapterRecipe | None = None
    """Train an adapter instead of all weights; with `model.quantization` this is QLoRA."""
    data: DataRecipe
    loss: Annotated[
        tuple[dict[str, Any], ...],
        BeforeValidator(normal_loss, json_schema_input_type=LossInput),
    ]
    """A method's name, a mapping of its name and its hyper-parameters, or a weighted sum of such."""
    reference: ReferenceRecipe = ReferenceRecipe()
    train: TrainRecipe = TrainRecipe()
    eval: EvalRecipe = EvalRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    tracking: TrackingRecipe = TrackingRecipe()
    output: Text = "runs/{recipe}"
    """The run folder; `{recipe}` is the name of the file. Running again resumes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything that is random."""

    _name: str = PrivateAttr(default="recipe")

    @model_validator(mode="after")
    def _possible_together(self) -> Recipe:
        refuse_conflicts(self)
        return self

    @property
    def name(self) -> str:
        """Stem of the file that the recipe was read from."""
        return self._name

    def named(self, name: str) -> Recipe:
        """Return the same recipe under another name."""
        recipe = self.model_copy()
        recipe._name = name
        return recipe

    def output_folder(self) -> Path:
        """Return the run folder, with `{recipe}` and `~` filled in."""
        return Path(self.output.replace("{recipe}", self.name)).expanduser()

    @property
    def drops(self) -> bool:
        """Whether the model or its adapter drops something at random while it trains."""
        return self.train.dropout or (self.adapter is not None and self.adapter.dropout > 0)

    def build_loss(self) -> Loss:
        """Return the loss that the recipe names."""
        return build_loss(self.loss)

    def to_mapping(self) -> dict[str, Any]:
        """Return every key with its resolved value, in plain Python types."""
        mapping = self.model_dump(mode="json")
        mapping["loss"] = written_loss(self.loss)
        mapping["output"] = self.output.replace("{recipe}", self.name)
        return mapping

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML that loads to the same recipe."""
        return dump_yaml(self.to_mapping())
