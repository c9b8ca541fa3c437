"""Speech models of transformers: what padding changes in the outputs of valid frames.

Without ``bn.masked`` padded frames enter the statistics of a training step. With it what is left is
what convolutions read across the end of a sample, as in evaluation by the same statistics.
"""

import pytest

from support.speech import changes, fastspeech2_conformer, wav2vec2_conformer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [wav2vec2_conformer, fastspeech2_conformer])
def test_valid_outputs_change_as_in_evaluation_however_much_is_padded(make):
    found = changes(make)
    for masked, stored in zip(found["train, masked"], found["eval"], strict=True):
        # A little more: what convolutions read across an end enters the statistics too.
        assert masked <= 1.05 * stored
    assert found["train, masked"][-1] == pytest.approx(found["train, masked"][-2], rel=1e-5)
    assert found["train"][-1] > 3 * found["train, masked"][-1]
