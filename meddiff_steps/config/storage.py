"""Section `storage`: what stays on disk, and where it goes."""

from typing import Annotated, Literal

from pydantic import Field

from meddiff_steps.config.base import Section

#: A folder in a bucket, of the characters that S3 calls safe and a few more.
S3 = r"^s3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9 !_.*'()=+@-]+)+$"


class Storage(Section):
    """What stays on disk."""

    temporary: list[Literal["latents", "generated", "filtered"]] = Field(
        [],
        description="Shards that are deleted when the last job that reads them has ended. A later change that needs "
        "them makes them, and all that was made of them, again (docs/cluster.md).",
    )
    protect: bool = Field(
        True,
        description="Finished weights and the root of a sealed release become read-only, and a run that would "
        "replace them is refused before it starts.",
    )
    cohort: Annotated[str, Field(pattern=S3)] | None = Field(
        None, description="Fetched into `cohort.root` before it is read: `s3://bucket/folder`."
    )
    publish: Annotated[str, Field(pattern=S3)] | None = Field(
        None, description="Where `snakemake publish` puts the sealed release: `s3://bucket/folder`."
    )
