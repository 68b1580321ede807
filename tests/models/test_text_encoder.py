"""Encoders of texts, and networks that attend to what they give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.tokens import AttendedTokens, CrossAttention
from meddiff_steps.models.text_encoder import TextEncoder, WordEncoder, build, read_transformer
from meddiff_steps.models.trained import load_text_encoder
from meddiff_steps.models.weights import save_model, weights_digest
from meddiff_steps.training.word_vectors import fit_words

TEXTS = ["left effusion", "right effusion", "left mass", "right mass", "clear", "clear chest, no mass"]


@pytest.fixture
def encoder() -> WordEncoder:
    return fit_words(TEXTS * 2, [str(i) for i in range(12)], width=6, max_tokens=5, min_subjects=2)


def test_words_that_stand_with_the_same_words_are_alike(encoder):
    vectors = dict(zip(encoder.vocabulary, encoder.vectors, strict=True))
    alike = torch.nn.functional.cosine_similarity
    assert alike(vectors["left"], vectors["right"], 0) > alike(vectors["left"], vectors["clear"], 0) + 0.5
    assert torch.allclose(encoder.vectors.square().mean(1), torch.ones(len(vectors)), atol=1e-5)


def test_a_token_is_a_word_and_its_neighbours(encoder):
    tokens = encoder.batch(["left effusion", None, "zebra", "left, zebra effusion"])
    assert tokens.shape == (4, 5, 12) and tokens.dtype == np.float32
    assert np.isfinite(tokens).all(-1).sum(1).tolist() == [2, 0, 0, 2]
    assert np.array_equal(tokens[0, 0, 6:], tokens[0, 1, :6]) and np.array_equal(tokens[0], tokens[3], equal_nan=True)
    assert not np.array_equal(encoder.batch(["mass"])[0, 0], encoder.batch(["no mass"])[0, 1])
    assert np.isfinite(encoder.batch(["left " * 9])).all()  # cut off at five


def test_an_encoder_is_the_same_again(encoder, tmp_path):
    again = fit_words(TEXTS * 2, [str(i) for i in range(12)], width=6, max_tokens=5, min_subjects=2)
    assert torch.equal(again.vectors, encoder.vectors)
    save_model(encoder, tmp_path, {"encoder": encoder.to_json()})
    loaded, _ = load_text_encoder(tmp_path)
    assert np.array_equal(loaded.batch(TEXTS), encoder.batch(TEXTS), equal_nan=True)


def test_too_few_common_words_are_refused():
    with pytest.raises(UserError, match=r"text.min_subjects: 1 word\(s\)"):
        fit_words(["mass a", "mass b"], ["1", "2"], 4, 5, 2)


def test_attention_asks_what_is_there_and_not_in_which_order():
    torch.manual_seed(0)
    told, attend = AttendedTokens({"text": 6}, 8), CrossAttention(12, 8)
    x, vectors = torch.randn(2, 12, 4, 4), torch.randn(2, 5, 6)
    assert torch.equal(attend(x, *told([vectors])), x)  # starts as the identity
    attend.last.weight.data.normal_()
    given = attend(x, *told([vectors]))
    assert torch.allclose(attend(x, *told([vectors[:, [4, 2, 0, 1, 3]]])), given, atol=1e-5)
    padded = torch.cat([vectors, torch.full((2, 9, 6), torch.nan)], 1)
    assert torch.allclose(attend(x, *told([padded])), given, atol=1e-5)
    nothing = attend(x, *told([torch.full((2, 5, 6), torch.nan)]))
    assert torch.isfinite(nothing).all() and (nothing - given).abs().max() > 1e-2
    nothing.square().mean().backward()
    assert torch.isfinite(told.null.grad).all() and told.null.grad.abs().sum() > 0


@pytest.mark.parametrize("network", ["unet", "resnet"])
def test_a_denoiser_depends_on_its_text_and_can_do_without(network):
    torch.manual_seed(0)
    small = {"channels": [8], "attention_levels": [True], "norm_num_groups": 4, "num_head_channels": 4}
    settings = config.Diffusion(network=network, num_res_blocks=1, covariate_dim=8, **small)
    model = Denoiser(settings, (4, 8, 8), [0], tokens={"text": 6}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, t, covariates = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 10.0]), torch.zeros(2, 1)
    vectors = torch.randn(2, 3, 6)
    said = model(x, t, Condition(covariates, tokens={"text": vectors}))
    other = model(x, t, Condition(covariates, tokens={"text": vectors + torch.tensor([[[0.0]], [[1.0]]])}))
    assert torch.allclose(said[0], other[0], atol=1e-5) and (said[1] - other[1]).abs().max() > 1e-4
    null = model(x, t, Condition(covariates, tokens={"text": vectors[:, :1] * torch.nan}))
    assert torch.equal(model(x, t, Condition(covariates)), null) and (null - said).abs().max() > 1e-4
    with pytest.raises(UserError, match=r"condition.tokens: found widths \{'text': 7\}"):
        model(x, t, Condition(covariates, tokens={"text": torch.randn(2, 3, 7)}))


# ------------------------------------------------------------------------------------------ of the user's own


@pytest.fixture
def folder(tmp_path):
    """A small frozen encoder with random weights, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "left", "effusion", "mass"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=16)
    transformers.BertModel(settings).save_pretrained(tmp_path / "bert")
    tokenizer.save(str(tmp_path / "bert/tokenizer.json"))
    return tmp_path / "bert"


def test_a_frozen_transformer_gives_its_last_states(folder, tmp_path):
    import transformers

    encoder = read_transformer(folder, 6)
    assert isinstance(encoder, TextEncoder) and encoder.width == 8
    network = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = network(torch.tensor([[2, 4, 5, 3]])).last_hidden_state[0].numpy()
    tokens = encoder.batch(["left effusion", None, "mass " * 9])
    assert np.allclose(tokens[0, :4], expected, atol=2e-3) and np.isnan(tokens[0, 4:]).all()
    assert np.isnan(tokens[1]).all() and np.isfinite(tokens[2]).all()
    save_model(encoder, tmp_path / "text", {"encoder": encoder.to_json()})
    again, card = load_text_encoder(tmp_path / "text")
    assert np.array_equal(again.batch(["left mass"]), encoder.batch(["left mass"]), equal_nan=True)
    assert str(tmp_path) not in json.dumps(card) and build(card["encoder"]).width == 8


def test_an_encoder_without_pooler_is_the_same_each_time(folder):
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    whole = load_file(weights)
    assert any(name.startswith("pooler.") for name in whole)
    save_file({k: v for k, v in whole.items() if not k.startswith("pooler.")}, weights, {"format": "pt"})
    first, second = (read_transformer(folder, 6) for _ in range(2))
    assert weights_digest(first.state_dict()) == weights_digest(second.state_dict())
    assert np.array_equal(first.batch(["left mass"]), second.batch(["left mass"]), equal_nan=True)


def test_an_encoder_that_counts_from_behind_padding_reads_fewer_tokens(folder):
    import transformers

    sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.RobertaConfig(**sizes, intermediate_size=8, max_position_embeddings=16, pad_token_id=1)
    transformers.RobertaModel(settings).save_pretrained(folder)
    with pytest.raises(UserError, match="text.max_tokens: 15, but roberta reads 14 at most"):
        read_transformer(folder, 15)
    assert np.isfinite(read_transformer(folder, 14).batch(["mass " * 20])).all()


def test_what_is_no_encoder_is_refused(folder):
    weights, settings = folder / "model.safetensors", folder / "config.json"
    content = json.loads(settings.read_text())
    with pytest.raises(UserError, match="text.max_tokens: 99, but bert reads 16"):
        read_transformer(folder, 99)
    settings.write_text(json.dumps(content | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UserError, match="asks for code of its own"):
        read_transformer(folder, 6)
    settings.write_text(json.dumps(content | {"hidden_size": 12}))
    with pytest.raises(UserError, match="cannot be read"):
        read_transformer(folder, 6)
    settings.write_text(json.dumps(content | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"lacks \d+ weight\(s\) of bert, such as encoder.layer.1"):
        read_transformer(folder, 6)
    settings.write_text(json.dumps(content | {"model_type": "nobodys"}))
    with pytest.raises(UserError, match="knows no model_type 'nobodys'"):
        read_transformer(folder, 6)
    settings.write_text(json.dumps(content))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors \(it has pytorch_model.bin, a pickle"):
        read_transformer(folder, 6)
    with pytest.raises(UserError, match="is no folder"):
        read_transformer(folder / "nowhere", 6)
