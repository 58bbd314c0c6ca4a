"""Steps that are recorded and replayed learn what launched steps learn, bit for bit. A tape stands in for the CUDA
graphs; everything else is as on a GPU: rates are tensors, losses are read late, the device holds back steps."""

import json
from pathlib import Path

import pytest

from dreambooth.runtime import graphs
from dreambooth.training import loss_log
from tests.running import digest, prior_words, run_train
from tests.tape import TapeRecorder

CASES = {
    "text encoder, prior preservation, accumulation, rates": (
        "tiny_base",
        "--train_text_encoder --train_text_encoder_frac 0.5 --gradient_accumulation_steps 2 --lora_dropout 0.2 "
        "--lr_scheduler cosine --max_grad_norm 0.01 --lr_pattern unet.up_blocks=1e-3 --checkpointing_steps 3 "
        "--validation_steps 3 --validation_prompt dog --num_validation_images 1",
    ),
    "v prediction, checkpointing, weights": (
        "tiny_v_base",
        "--train_text_encoder --gradient_checkpointing --snr_gamma 5 --noise_offset 0.1 --train_batch_size 2",
    ),
    "SDXL": ("tiny_xl", "--train_text_encoder --gradient_checkpointing --train_batch_size 2"),
    "EDM": ("tiny_edm", "--use_dora --lora_dropout 0.1"),
    "IF": ("tiny_if", "--adapter lokr"),
    "LoHa": ("tiny_base", "--adapter loha --mixed_precision fp16 --gradient_accumulation_steps 2"),
}


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs record their steps on this CPU."""
    monkeypatch.setattr(graphs, "can_record", lambda device: True)
    monkeypatch.setattr(graphs, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(loss_log, "steps_between_readings", lambda device: 3)


def status(out: Path) -> str:
    return json.loads((out / "status.json").read_text())["cuda_graph"]


@pytest.mark.trains
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_learn_what_launched_steps_learn(taped, case, request, photos_dir, tmp_path):
    base, words = CASES[case]
    more = ["--max_train_steps", "6", *words.split()]
    if "prior" in case:
        more += prior_words(tmp_path / "class")
    base_dir = request.getfixturevalue(base)
    launched = run_train(base_dir, photos_dir, tmp_path / "launched", *more, "--cuda_graph", "off")
    replayed = run_train(base_dir, photos_dir, tmp_path / "replayed", *more)
    assert status(replayed.parent) == "replayed"
    assert status(launched.parent) == "launched: --cuda_graph off"
    assert digest(replayed) == digest(launched)
