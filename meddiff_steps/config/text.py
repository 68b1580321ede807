"""Section `text`: what reports and other notes say of scans."""

from typing import Annotated

from pydantic import Field

from meddiff_steps.config.base import Fraction, Name, NoOrLocalPath, PositiveInt, Section


class FreeText(Section):
    """Texts that belong to scans; the diffusion model attends to their words, and a plan can ask for texts. Off by
    default."""

    column: str | None = Field(
        None, description="Column of the cohort's table, or of participants.tsv or sessions.tsv. Left out: no texts."
    )
    encoder: NoOrLocalPath = Field(
        None,
        description="Folder of a frozen encoder in the format of the library transformers: config.json, tokenizer.json "
        "and model.safetensors. Left out: vectors of words, learnt from the training texts.",
    )
    max_tokens: PositiveInt = Field(64, description="Tokens of a text that are read; what follows is cut off.")
    width: PositiveInt = Field(32, description="Numbers of the vector of a word, where no `encoder` is given.")
    min_subjects: PositiveInt = Field(
        5,
        description="Training subjects whose texts must have a word before it is learnt: rarer ones may be names.",
    )
    shared_words: Annotated[int, Field(ge=3)] = Field(
        8,
        description="A planned text that has so many words in a row from a text of the cohort is refused, unless "
        "`min_subjects` subjects have them, too.",
    )
    dropout: Fraction = Field(
        0.1, description="Probability that a text is dropped in training, beside `diffusion.condition_dropout`."
    )
    token_dropout: Fraction = Field(0.1, description="Probability that one token of a text is dropped in training.")
    findings: dict[Name, Annotated[list[str], Field(min_length=1)]] = Field(
        {},
        description="Findings whose fidelity is measured, each with the phrases that name it; `consolidat*` stands for "
        "all words that begin so. A negated phrase does not count.",
    )
    draws: PositiveInt = Field(4, description="Images that are drawn for each held-out text when it is measured.")
