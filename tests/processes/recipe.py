"""One stage on the album of `tests.e2e.story`, from random weights, then questions: for runs of several processes.

Run:      lvlm train --config tests/processes/recipe.py:ALBUM --workdir DIR
"""

from ml_collections import ConfigDict

from tests.e2e import story

STEPS = 16


def get_config(arg: str = "") -> ConfigDict:
    """Connector and language model train, cut over all devices (FSDP); four groups, so up to four data shards."""
    c = story.get_config(arg)
    c.unlock()
    c.name, c.run, c.mesh = "processes", ("instruct",), "FSDP"
    c.stages = {"instruct": c.stages.instruct}
    stage = c.stages.instruct
    stage.update(steps=STEPS, save_every=5, evaluate=("after",))
    stage.start, stage.optimizer = {}, {"learning_rate": 2e-3, "warmup": 2}
    stage.data.update(rows=8, groups=4, pictures=32)
    c.evaluation = {"data": {"source": "llava_json", "path": f"{arg}/questions.jsonl"}, "max_new_tokens": 4, "rows": 3}
    c.report = True
    return c
