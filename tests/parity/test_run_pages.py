"""A training that a node orders leaves the same page as one of the command line."""

from __future__ import annotations

import json
import re

import numpy as np
import torch
from comfyui_diptych.training import session
from PIL import Image
from toys import reward_config


def test_a_training_of_a_node_leaves_its_page_with_before_and_after(folders, tmp_path):
    config = reward_config(folders, tmp_path / "run", max_steps=1, sample_count=1)
    outcome = session.train(config, cpu=True)
    kept = torch.from_numpy(np.array(Image.open(tmp_path / "run" / "before_after.png")))
    assert torch.equal(kept, outcome.samples[0].mul(255).round().to(torch.uint8))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Before and after" in text and "run it again with the same settings" in text
    assert len(re.findall(r'aria-label="reward: toy_judge:brightness"', text)) == 1
    noted = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (noted["step"], noted["result"], noted["command"]) == (1, outcome.lora.name, "")
    assert noted["given"]["rewards"] == ["toy_judge:brightness"] and "lr_schedule" not in noted["given"]
