"""The effect of padding on the valid outputs of speech models: rows of data as CSV.

    python benchmarks/padding.py

Nothing is timed. Small models of transformers with random weights (``tests/support/speech.py``) get
the same samples with more and more padded frames. Written is the norm of the change of the outputs
of valid frames over their norm: in training, in training under ``bn.masked``, and with batch
normalization in evaluation, where what is left is what convolutions read across a sample's end.
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import transformers

from batchnorm.benchmark.rows import circumstances
from row_files import append
from support.speech import PADDED, changes, fastspeech2_conformer, wav2vec2_conformer

ROWS = Path(__file__).parent / "data" / "variants" / "padding.csv"
MODELS = {"Wav2Vec2Conformer": wav2vec2_conformer, "FastSpeech2Conformer": fastspeech2_conformer}


def main() -> None:
    """Rewrite all rows."""
    warnings.simplefilter("ignore")
    ROWS.unlink(missing_ok=True)
    version = transformers.__version__
    for name, make in MODELS.items():
        for mode, found in changes(make).items():
            for frames, change in zip((0, *PADDED), (0.0, *found), strict=True):
                row = {"model": name, "mode": mode, "padded": frames, "change": f"{change:.3g}"}
                append(ROWS, row | {"version": version} | circumstances())
                print(name, mode, frames, f"{change:.3g}", flush=True)


if __name__ == "__main__":
    main()
