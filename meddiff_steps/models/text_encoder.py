"""From a text to the vectors of its tokens, which a denoiser attends to.

An encoder is never trained with the denoiser; it lies with the denoiser's weights, so that whoever has a model can ask
it for texts, and its digest covers both.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import rfc8785
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from meddiff_steps.cohort.texts import words
from meddiff_steps.core.errors import UserError

#: Words on either side of one whose vectors its token holds the mean of.
NEIGHBOURS = 2
#: Files of a folder that the library transformers reads an encoder from.
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
#: Keys of a transformers config that say where it lay, or which code of a stranger's to run.
_NOT_OF_THE_NETWORK = ("_name_or_path", "auto_map", "transformers_version")


class TextEncoder(nn.Module, ABC):
    """From a text to vectors; frozen.

    Attributes
    ----------
    width
        Of a vector.
    max_tokens
        Vectors of a text at most.
    """

    width: int
    max_tokens: int
    description: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Of what is no tensor, and yet decides what a text becomes: so the digest of the weights covers it, too.
        self.register_buffer("description", torch.zeros(32, dtype=torch.uint8))

    def described(self) -> Tensor:
        """SHA-256 of `to_json`, uint8 (32,)."""
        content = rfc8785.dumps(self.to_json())
        return torch.tensor(list(hashlib.sha256(content).digest()), dtype=torch.uint8)

    def finish(self) -> Self:
        """Frozen, and with the digest of its description among its weights."""
        self.description.copy_(self.described())
        return self.requires_grad_(False).eval()

    def check(self, folder: Path) -> None:
        """Refuse weights that were kept with another vocabulary or tokenizer.

        Raises
        ------
        UserError
            They were.
        """
        if not torch.equal(self.description.cpu(), self.described()):
            raise UserError(
                f"{folder}: its card describes another encoder of texts than its weights are of. Take both from one"
                " training."
            )

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Vectors of a text's tokens, float32 (n, width), n at most `max_tokens`."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `build` needs beside the weights."""

    @torch.no_grad()
    def batch(self, texts: Sequence[str | None]) -> np.ndarray:
        """Vectors of texts, float32 (b, max_tokens, width); NaN where there are none, and where there is no text.

        Each text is encoded by itself, so that nothing depends on its company, and rounded to half precision, in which
        vectors are kept.
        """
        found = np.full((len(texts), self.max_tokens, self.width), np.nan, np.float32)
        known: dict[str, np.ndarray] = {}
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                continue
            if text not in known:
                known[text] = self.encode(text).float().cpu().numpy().astype(np.float16).astype(np.float32)
            found[row, : len(known[text])] = known[text]
        return found


class WordEncoder(TextEncoder):
    """A table of vectors: a token is the vector of a word beside the mean of those of its neighbours.

    Words that are not in the vocabulary are passed over.

    Parameters
    ----------
    vocabulary
        Words as `cohort.texts.words` gives them.
    width
        Of a word's vector; a token has twice as many numbers.
    """

    vectors: Tensor

    def __init__(self, vocabulary: Sequence[str], width: int, max_tokens: int) -> None:
        super().__init__()
        self.vocabulary, self.width, self.max_tokens = tuple(vocabulary), 2 * width, max_tokens
        self.places = {word: place for place, word in enumerate(self.vocabulary)}
        self.register_buffer("vectors", torch.zeros(len(self.vocabulary), width))

    def encode(self, text: str) -> Tensor:
        rows = [self.places[word] for word in words(text) if word in self.places][: self.max_tokens]
        own = self.vectors[rows]
        around = torch.zeros_like(own)
        for place in range(len(rows)):
            near = [p for p in range(place - NEIGHBOURS, place + NEIGHBOURS + 1) if p != place and 0 <= p < len(rows)]
            if near:
                around[place] = own[near].mean(0)
        return torch.cat([own, around], 1)

    def to_json(self) -> dict[str, Any]:
        width = self.vectors.shape[1]
        return {
            "kind": "words",
            "vocabulary": list(self.vocabulary),
            "width": width,
            "max_tokens": self.max_tokens,
        }


class TransformerEncoder(TextEncoder):
    """An encoder of the library transformers: vectors are the states of its last layer.

    Parameters
    ----------
    config
        Its config.json.
    tokenizer
        The text of its tokenizer.json.
    """

    def __init__(self, config: Mapping[str, Any], tokenizer: str, max_tokens: int) -> None:
        super().__init__()
        transformers, tokenizers = _libraries()
        kind = str(config["model_type"])
        self.config = {key: value for key, value in config.items() if key not in _NOT_OF_THE_NETWORK}
        settings = transformers.AutoConfig.for_model(**self.config)
        mapping = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
        family = transformers.AutoModelForTextEncoding if type(settings) in mapping else transformers.AutoModel
        self.network = family.from_config(settings).float().eval()
        width, longest = _width(settings), _longest(settings, self.network)
        if longest is not None and max_tokens > longest:
            raise UserError(
                f"text.max_tokens: {max_tokens}, but {kind} reads {longest} at most. Set it to that, or less."
            )
        self.tokenizer_json, self.width, self.max_tokens = tokenizer, width, max_tokens
        self.tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens)

    def encode(self, text: str) -> Tensor:
        device = next(self.network.parameters()).device
        ids = torch.tensor([self.tokenizer.encode(text).ids], device=device)
        return self.network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "transformers",
            "config": self.config,
            "tokenizer": self.tokenizer_json,
            "max_tokens": self.max_tokens,
        }


def build(card: Mapping[str, Any]) -> TextEncoder:
    """The encoder of a card, with fresh weights."""
    if card["kind"] == "words":
        return WordEncoder(card["vocabulary"], card["width"], card["max_tokens"])
    return TransformerEncoder(card["config"], card["tokenizer"], card["max_tokens"])


def read_transformer(folder: Path, max_tokens: int) -> TransformerEncoder:
    """The frozen encoder of a folder: config.json, tokenizer.json, and weights as safetensors.

    Nothing is fetched, no pickle is opened, and no code of the folder is run.

    Raises
    ------
    UserError
        The library transformers is missing, the folder lacks a file, its config asks for code of its own, or the
        weights are not those of the network that it describes.
    """
    transformers, _ = _libraries()
    if not folder.is_dir():
        raise UserError(f"text.encoder: {folder} is no folder. Give the one that holds {CONFIG} and model.safetensors.")
    if not sorted(folder.glob("model*.safetensors")):
        other = next((path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))), None)
        found = f"it has {other}, a pickle, which can run code" if other else "it has no weights"
        raise UserError(
            f"text.encoder: {folder} has no model.safetensors ({found}). Convert it where you trust it: load the model"
            " with transformers and call save_pretrained(FOLDER), which writes safetensors."
        )
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise UserError(
                f"text.encoder: {folder} has no {name}. Save model and fast tokenizer with save_pretrained(FOLDER)."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"text.encoder: {folder / CONFIG} is no config of transformers ({error!r}).") from None
    if "auto_map" in config:
        raise UserError(
            f"text.encoder: {folder / CONFIG} asks for code of its own (auto_map), which is never run. Take an encoder"
            " whose architecture the library has."
        )
    if kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        raise UserError(f"text.encoder: transformers {transformers.__version__} knows no model_type {kind!r}.")
    try:
        encoder = TransformerEncoder(config, (folder / TOKENIZER).read_text(encoding="utf-8"), max_tokens)
        network, told = type(encoder.network).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError, AttributeError) as error:
        raise UserError(
            f"text.encoder: {folder} cannot be read ({str(error).splitlines()[0]}). {CONFIG}, {TOKENIZER} and weights"
            " must be those of one encoder."
        ) from None
    except Exception as error:  # noqa: BLE001 tokenizers raises Exception itself
        raise UserError(f"text.encoder: {folder / TOKENIZER} cannot be read ({error}).") from None
    # Of a head that states do not pass through, weights may be missing.
    lacking = sorted(name for name in told["missing_keys"] if not name.startswith(("pooler.", "lm_head.")))
    if lacking:
        raise UserError(
            f"text.encoder: {folder} lacks {len(lacking)} weight(s) of {kind}, such as {lacking[0]}. Take weights and"
            f" {CONFIG} from one place."
        )
    size = encoder.tokenizer.get_vocab_size()
    rows = network.get_input_embeddings().weight.shape[0]
    if size > rows:
        raise UserError(
            f"text.encoder: {folder / TOKENIZER} has {size} tokens, the weights have {rows}. Take both from one place."
        )
    # What is missing came fresh from a global generator, and would give another digest each time.
    state = network.state_dict()
    state |= {name: torch.zeros_like(state[name]) for name in told["missing_keys"]}
    encoder.network.load_state_dict(state)
    return encoder.finish()


def _width(settings: Any) -> int:
    for name in ("hidden_size", "d_model", "dim"):
        if isinstance(getattr(settings, name, None), int):
            return int(getattr(settings, name))
    raise UserError(f"text.encoder: {settings.model_type} is no text encoder: its config has no hidden_size.")


def _longest(settings: Any, network: nn.Module) -> int | None:
    """Tokens that a network has places for; None: any number. RoBERTa and its kin count from behind that of padding."""
    longest: int | None = getattr(settings, "max_position_embeddings", None)
    places = [each for name, each in network.named_modules() if name.endswith("position_embeddings")]
    paddings = [each.padding_idx for each in places if getattr(each, "padding_idx", None) is not None]
    return longest if longest is None else longest - max((padding + 1 for padding in paddings), default=0)


def _libraries() -> tuple[Any, Any]:
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("tokenizers") is None:
        raise UserError(
            "text.encoder: needs the package transformers. Install it (pip install 'meddiff-steps[text]'), or leave"
            " text.encoder out: vectors of words are then learnt from the cohort's own texts."
        )
    return importlib.import_module("transformers"), importlib.import_module("tokenizers")
