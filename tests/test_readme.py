"""The README's Python example runs as written."""

import re
from pathlib import Path

import numpy as np


def test_python_example(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    scope: dict = {}
    for code in examples:
        exec(code, scope)
    images, completed = scope["images"], scope["completed"]
    assert completed.shape == (4, 3, 64)
    np.testing.assert_array_equal(
        np.asarray(completed)[:, :, :32], np.repeat(images[1500:1504, None, :32], 3, axis=1)
    )
    assert completed.min() >= 0 and completed.max() <= 16
    nats = float(scope["circuit"].log_prob(images[1500:]).mean())
    assert nats / (-np.log(2) * 64) < 2.3  # bits per dimension
    np.testing.assert_array_equal(scope["best"].x[:, :32], images[1500:1502, :32])
    assert scope["mean"].shape == (2, 64)
    assert scope["tree"].num_parameters > 2 * scope["circuit"].num_parameters


def test_commands_of_the_readme_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    for path in re.findall(r"\./((?:launch|tools)/\w+\.sh)|python (tools/\w+\.py)", text):
        assert (repository / "".join(path)).is_file()
    for path in re.findall(r"`(distpc/[\w/]+\.py)`|\]\((docs/[\w.]+)\)", text):
        assert (repository / "".join(path)).is_file()
    for path in re.findall(r"configs/\w+\.yaml", text):
        assert (repository / path).is_file()
