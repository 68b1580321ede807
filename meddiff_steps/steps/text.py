"""Step `text`: the encoder of a study's texts, and the vectors of each text, once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import torch
import typer
from tqdm import tqdm

from meddiff_steps.cohort.manifest import read_manifest, usable
from meddiff_steps.cohort.texts import COLUMN, text_digest
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import TEXT
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.models.text_encoder import TextEncoder, read_transformer
from meddiff_steps.models.weights import save_model
from meddiff_steps.steps import options
from meddiff_steps.training.word_vectors import fit_words

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    out: Annotated[Path, typer.Option(help="folder to write: the encoder, its card, and tokens.arrow")],
    qc: options.KeptBy = None,
    threads: options.Threads = 1,
) -> None:
    """Encode every text of the cohort once: a row per text, by its digest.

    The encoder is the user's own (text.encoder), or vectors of words that training texts give.
    """
    settings = load_stage(config, "text").text
    torch.set_num_threads(threads)
    table = read_manifest(manifest)
    having = table[table[COLUMN].notna()]
    learnt_from = having if qc is None else usable(having, pd.read_parquet(qc))
    training = learnt_from[learnt_from["split"] == "train"].drop_duplicates(["subject_id", COLUMN])
    if training.empty:
        raise UserError("text.column: no scan of the train split has a text. Add some, or raise splits.train.")
    encoder: TextEncoder
    if settings.encoder is not None:
        encoder = read_transformer(Path(settings.encoder), settings.max_tokens)
    else:
        encoder = fit_words(
            training[COLUMN].tolist(),
            training["subject_id"].tolist(),
            settings.width,
            settings.max_tokens,
            settings.min_subjects,
        )
    texts = sorted(set(having[COLUMN]))
    columns = {
        "text_sha256": pa.string(),
        "tokens": TensorColumn("float16", (encoder.max_tokens, encoder.width)),
    }
    empty = 0
    with ShardWriter(out / TEXT[2], columns) as writer:
        for text in tqdm(texts, desc="texts", unit="text", mininterval=5, file=sys.stderr):
            tokens = encoder.batch([text])[0]
            empty += bool((tokens != tokens).all())
            writer.append(text_sha256=text_digest(text), tokens=tokens)
    facts = {
        "texts": {"distinct": len(texts), "training": int(training[COLUMN].nunique()), "without_known_words": empty},
        "subjects": int(training["subject_id"].nunique()),
    }
    save_model(encoder, out, {"encoder": encoder.to_json(), **facts})
    log.info("%s: %d texts, %d numbers per token", out, len(texts), encoder.width)
