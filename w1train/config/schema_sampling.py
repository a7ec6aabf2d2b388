"""The part of the configuration that is about sampling. ``schema.py`` says how these classes are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from w1train.config.constraints import (
    FractionBelowOne,
    Length,
    NonNegativeFloat,
    NonNegativeInteger,
    OptionalPath,
    PositiveFloat,
    PositiveFraction,
    PositiveInteger,
    Range,
)


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """Text generated while training, and the defaults of `w1train sample`."""

    interval: NonNegativeInteger = 0
    """Steps between samples during training; 0 = never."""
    prompts: list[str] = field(default_factory=lambda: [""])
    """One text is sampled after each prompt."""
    chat_template: OptionalPath = None
    """The chat template by which each prompt becomes the message of a user, to which the model writes the reply: a jinja file, a
    tokenizer_config.json, a directory of a Hugging Face model, or built_in = the template of `w1train data conversations` without
    --template. A reply ends before EOS, or before the token that ends a turn. null = the model continues the prompts."""
    num_tokens: Length = 128
    """Tokens generated after the prompt."""
    num_steps: Length = 64
    """Denoising steps of all blocks together; not used with a threshold."""
    threshold: PositiveFraction | None = None
    """Each step unmasks every token whose prediction is more probable than this threshold, and at least one token, until no token of the
    block is masked (confidence-threshold parallel decoding); null = num_steps decides how many tokens each step unmasks."""
    block_size: Length | None = None
    """Tokens that are denoised together; blocks follow each other from left to right. null = diffusion.block_size for a model of block
    diffusion, and one block of all tokens for a model of masked diffusion, whose sampling is semi-autoregressive with smaller blocks."""
    temperature: NonNegativeFloat = 0.0
    """0 = the most probable token; otherwise Gumbel-max sampling at this temperature."""
    remasking: str = "low_confidence"
    """The predictions that are masked again at each step of kernel=unmask: low_confidence = the least confident predictions, random =
    random predictions."""
    seed: NonNegativeInteger = 0
    """Seed of the sampler's noise."""
    kernel: str | None = None
    """The rule of a step. unmask: start from masks and keep some predictions, which never change again. ancestral: go through equal steps
    of t by the reverse kernel of the process, so that tokens can change. gidd_posterior: the same on GIDD's grid. null = unmask for masked
    diffusion, ancestral for processes that put other tokens in the place of tokens."""
    gidd_epsilon: Annotated[float, Range(0, 0.5, includes_minimum=False, includes_maximum=False)] = 1.0e-4
    """The end of the grid of kernel=gidd_posterior, which goes from 1 - gidd_epsilon to gidd_epsilon (GIDD)."""
    gidd_min_p: FractionBelowOne = 0.0
    """The threshold of kernel=gidd_posterior: ids whose probability in a step is below this number are not drawn (GIDD's min_p); 0 =
    all are."""
    posterior_temperature: PositiveFloat = 1.0
    """The temperature of the probabilities of a step of kernel=gidd_posterior. W1 publishes the name of this option, but not its meaning,
    which is our choice."""
    reviser: str | None = None
    """The rule that changes a text after its last step (with block diffusion: each block), for models trained with noise that puts
    other tokens in the place of tokens. conditional_modes: replace tokens that are probably wrong, given the whole text and the noise
    of the process. self_correction: GIDD's fixed-point iteration, which moves the text towards the model's most probable tokens. null =
    nothing."""
    correction_steps: PositiveInteger = 128
    """Most steps of a reviser (GIDD)."""
    correction_tokens: PositiveInteger = 1
    """Tokens that a step of a reviser changes (GIDD)."""
    correction_temperature: PositiveFloat = 0.1
    """The temperature of the tokens that reviser=self_correction draws (GIDD: 0.1 to 0.5)."""
    correction_timestep: PositiveFraction = 0.01
    """t at which the model reads the text in a revision (GIDD). For reviser=conditional_modes it also says how much noise the text has."""
    correction_patience: PositiveInteger = 32
    """The patience of reviser=self_correction: the revision ends after this many steps in which the share of tokens that are the
    model's most probable tokens has not grown (GIDD)."""
