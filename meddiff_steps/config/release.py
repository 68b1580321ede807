"""Section `release`: what the published cohort says of itself."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from meddiff_steps.config.base import TEXT, Fraction, NoOrLocalPath, PositiveInt, Section, Text

#: What 3D images can show, as file names say it. BIDS has no name for CT yet: its validator is told to pass it over.
Suffix = Literal["T1w", "T2w", "PDw", "FLAIR", "T2starw", "inplaneT1", "inplaneT2", "CT"]
SUFFIXES: tuple[str, ...] = get_args(Suffix)


class Card(Section):
    """The half of the release's README that only its publisher can write; what stays empty is a blank there."""

    intended_use: Text = Field("", description="What the cohort is meant for.")
    not_for: Text = Field("", description="What it must not be used for.")
    ethics: Text = Field("", description="Consent and approvals behind the source data.")
    limitations: Text = Field("", description="Known biases and shortfalls that the figures do not show.")
    contact: Text = Field("", description="Whom to ask.")


class Release(Section):
    """The synthetic cohort as a BIDS dataset."""

    name: Text = Field("Synthetic cohort", description="Name in dataset_description.json.")
    authors: Annotated[list[str], TEXT] = Field(
        [], description="Names of its publishers, in order, for dataset_description.json."
    )
    licence: Text = Field(
        "CC0", description="Licence of the synthetic images: what the terms of the source data allow."
    )
    licence_text: Text = Field(
        "",
        description="Full text of the licence; needed where it is none of CC0, PDDL, CC-BY-4.0, CC-BY-SA-4.0, "
        "CC-BY-NC-4.0 and CC-BY-NC-SA-4.0, whose texts are known.",
    )
    suffix: Suffix = Field(
        "T1w",
        description="BIDS suffix of 3D images: their contrast. By default that of the scans, `cohort.suffix`, where it "
        "is one of these.",
    )
    skull_stripped: bool = Field(
        True, description="Whether the images that the model learnt from show the brain only (BIDS SkullStripped)."
    )
    acknowledgements: Text = Field("", description="Acknowledgement that the source data ask for.")
    signing_key: NoOrLocalPath = Field(
        None, description="Path of a private key that `keygen` made; the release is then signed. Never published."
    )
    url: Text = Field("", description="Address at which the release will be found.")
    date: Text = Field(
        "",
        pattern=r"^(\d{4}-\d{2}-\d{2})?$",
        description="Day of publication, YYYY-MM-DD; by default the day on which the last image was made.",
    )
    shard_size: PositiveInt = Field(
        1000,
        description="Subjects per dataset: if more are planned, the release is several datasets, each complete by "
        "itself, of at most so many subjects.",
    )
    card: Card = Field(Card(), description="What only the publisher can say, for the README.")
    exports: list[Literal["webdataset"]] = Field(
        [],
        description="Copies for machine learning, beside the release: `webdataset` writes tar shards and a table.",
    )
    models: bool = Field(
        False,
        description="Whether the weights are packed for publication, too, as a MONAI bundle. They can give away "
        "more of the training scans than images do.",
    )
    models_licence: Text = Field("", description="Licence of the packed weights.")
    membership_limit: Fraction = Field(
        0.6,
        description="Largest AUC by which training scans may be told from unseen ones with the weights, for these to "
        "be packed, and as far below 0.5. Where the whole 95 % interval is beyond, or nothing was measured, "
        "`privacy.enforce` says what happens.",
    )
