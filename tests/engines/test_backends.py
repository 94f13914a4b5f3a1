"""Files of the engines: no pickle is written, and none is read."""

import zipfile
from pathlib import Path

import pytest
import torch

from minidiff.engines.backends import FORMATS
from minidiff.errors import CheckpointError


def linear() -> torch.export.ExportedProgram:
    return torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(2, 3),))


def test_a_graph_of_torch_export_is_written_and_read_without_a_pickle(tmp_path: Path) -> None:
    program, path = linear(), tmp_path / "network.pt2"
    FORMATS["pt2"].write(program, (), path)
    with zipfile.ZipFile(path) as archive:
        heads = {name: archive.read(name)[:2] for name in archive.namelist()}
    assert not [name for name, head in heads.items() if head in (b"PK", b"\x80\x02")]

    x = torch.ones(2, 3)
    again = torch.stack(FORMATS["pt2"].load(path, torch.float32)([x]))
    assert torch.equal(again, program.module()(x))


@pytest.mark.parametrize("kind", ["examples", "damaged"])
def test_a_graph_with_a_pickle_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "network.pt2"
    if kind == "examples":
        torch.export.save(linear(), str(path))
        message = "contains a pickle"
    else:
        path.write_bytes(b"PK")
        message = "is no graph of torch.export"
    with pytest.raises(CheckpointError, match=message):
        FORMATS["pt2"].load(path, torch.float32)
