"""Speech models of transformers with batch normalization, and how padding changes their outputs."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import batchnorm as bn
from support import third_party

LENGTHS = torch.tensor([100, 75, 45])
PADDED = (10, 50, 200)
MODES = ("train", "train, masked", "eval")

Block = Callable[[Any], contextlib.AbstractContextManager[Any]]
Run = Callable[[int, Block], Tensor]

SMALL = {"num_attention_heads": 2, "layerdrop": 0.0}


def wav2vec2_conformer() -> tuple[torch.nn.Module, Run]:
    """Raw audio, 20 samples a frame; lengths pass through three convolutions."""
    models: Any = third_party.transformers()
    quiet = ("hidden", "attention", "activation", "feat_proj", "conformer_conv", "final")
    config = models.Wav2Vec2ConformerConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, **SMALL,
        conv_dim=(8, 8, 8), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        apply_spec_augment=False, **{f"{name}_dropout": 0.0 for name in quiet},
    )  # fmt: skip
    model = bn.convert(models.Wav2Vec2ConformerModel(config))
    lengths = LENGTHS * 20
    x = torch.randn(3, int(lengths.max()))

    def run(padded: int, block: Block) -> Tensor:
        mask = torch.arange(x.shape[1] + 20 * padded) < lengths[:, None]
        given = torch.nn.functional.pad(x, (0, 20 * padded)) * mask
        with block(mask):
            y = model(given, attention_mask=mask.long()).last_hidden_state
        kept = model._get_feat_extract_output_lengths(lengths)
        return torch.cat([one[:n] for one, n in zip(y, kept.tolist(), strict=True)]).detach()

    return model, run


def fastspeech2_conformer() -> tuple[torch.nn.Module, Run]:
    """Phonemes, and frames that the model makes of them: two time axes."""
    models: Any = third_party.transformers()
    quiet = (
        "encoder_dropout_rate", "encoder_positional_dropout_rate", "encoder_attention_dropout_rate",
        "decoder_dropout_rate", "decoder_positional_dropout_rate", "decoder_attention_dropout_rate",
        "duration_predictor_dropout_rate", "energy_predictor_dropout", "energy_embed_dropout",
        "pitch_predictor_dropout", "pitch_embed_dropout", "speech_decoder_postnet_dropout",
        "module_dropout",
    )  # fmt: skip
    names = dict.fromkeys(quiet, 0.0)
    config = models.FastSpeech2ConformerConfig(
        hidden_size=16, vocab_size=30, num_mel_bins=8, encoder_layers=1, decoder_layers=1,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, encoder_linear_units=32,
        decoder_linear_units=32, speech_decoder_postnet_units=16, duration_predictor_channels=16,
        energy_predictor_channels=16, pitch_predictor_channels=16, **names,
    )  # fmt: skip
    model = bn.convert(models.FastSpeech2ConformerModel(config))
    ids, frames = torch.randint(1, 30, (3, 100)), torch.randint(1, 4, (3, 100))

    def run(padded: int, block: Block) -> Tensor:
        mask = torch.arange(100 + padded) < LENGTHS[:, None]
        pad = torch.nn.functional.pad
        durations = pad(frames, (0, padded)) * mask
        made = durations.sum(1)
        behind = torch.arange(int(made.max())) < made[:, None]
        pitch = pad(torch.ones(3, 100, 1), (0, 0, 0, padded))
        with block({"": mask, "decoder": behind, "speech_decoder_postnet": behind}):
            y = model(
                pad(ids, (0, padded)) * mask, attention_mask=mask.long(), duration_labels=durations,
                pitch_labels=pitch, energy_labels=pitch, spectrogram_labels=torch.zeros(3, int(made.max()), 8),
            ).spectrogram  # fmt: skip
        return torch.cat([one[:n] for one, n in zip(y, made.tolist(), strict=True)]).detach()

    return model, run


def changes(make: Callable[[], tuple[torch.nn.Module, Run]]) -> dict[str, list[float]]:
    """Return mode -> relative changes of the valid outputs, for each number of padded frames."""
    torch.manual_seed(0)
    model, run = make()
    norms = {"filter": lambda _, module: isinstance(module, bn.BatchNorm1d)}
    bn.set_options(
        model, momentum=1.0, **norms
    )  # evaluation then uses the statistics of this batch
    run(0, lambda mask: bn.masked(model.train(), mask=mask))
    state = copy.deepcopy(model.state_dict())
    found = {}
    for mode in MODES:
        masked = mode == "train, masked"
        block = (lambda mask: bn.masked(model, mask=mask)) if masked else contextlib.nullcontext
        outputs = []
        for padded in (0, *PADDED):
            model.load_state_dict(state)
            for layer in model.train().modules():
                if isinstance(layer, bn.BatchNorm1d):
                    layer.train(mode != "eval")
            outputs.append(run(padded, block))
        first, *others = outputs
        found[mode] = [float((y - first).norm() / first.norm()) for y in others]
    return found
