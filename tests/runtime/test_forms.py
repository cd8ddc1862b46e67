"""The form of a weight: the usual one, unless another measured clearly faster on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybrid_fx.cache.machine import Machine, read_seconds, write_seconds
from hybrid_fx.passes.packing import PLAIN, PackForm, packs, usual_forms
from hybrid_fx.runtime import forms
from hybrid_fx.runtime.forms import chosen, measure, measured_forms, names_of

CPU = torch.device("cpu")
#: Collected before the session's stand-in takes its place.
MEASURED = forms._seconds
OWN, SINGLE = PackForm(torch.bfloat16), PackForm(torch.float32, plain_rows=1)

needs_onednn = pytest.mark.skipif(
    not packs(CPU, torch.float32), reason="needs a torch built with oneDNN"
)


def bfloat16(
    *, own: float | None, single: float, plain: float, one: tuple[float, float, float]
) -> dict[str, list[float]]:
    """Seconds for more rows of each form, and for one row of each."""
    rows = {"bfloat16": own, "float32": single, "plain": plain}
    return {
        name: [first, more, more]
        for (name, more), first in zip(rows.items(), one, strict=True)
        if more is not None
    }


#: As measured: one weight [9728, 896], rows 1 and 4, in ms.
AVX512 = bfloat16(own=0.67, single=1.72, plain=1.12, one=(0.72, 1.63, 1.20))
AVX2 = bfloat16(own=None, single=2.02, plain=3.06, one=(0, 1.60, 1.27))


def test_a_processor_that_packs_bfloat16_well_keeps_to_it() -> None:
    assert chosen(torch.bfloat16, OWN, AVX512, same_dtype=False) == OWN
    assert chosen(torch.bfloat16, OWN, AVX512, same_dtype=True) == OWN


def test_a_processor_that_cannot_packs_in_float32_and_one_row_reads_the_weight() -> None:
    assert chosen(torch.bfloat16, SINGLE, AVX2, same_dtype=False) == SINGLE


def test_where_no_other_dtype_is_wanted_the_weight_stays_as_it_is() -> None:
    assert chosen(torch.bfloat16, SINGLE, AVX2, same_dtype=True) == PLAIN


@pytest.mark.parametrize("factor", [0.85, 1.2])
def test_what_is_usual_stays_where_another_is_not_clearly_faster(factor: float) -> None:
    even = (1.0, 1.0, 1.0)
    for other in ("single", "plain"):
        seconds = bfloat16(**{"own": 1.0, "single": 9.0, "plain": 9.0, other: factor}, one=even)
        assert chosen(torch.bfloat16, OWN, seconds, same_dtype=False) == OWN
    seconds = bfloat16(own=None, single=1.0, plain=factor, one=even)
    assert chosen(torch.bfloat16, SINGLE, seconds, same_dtype=False).dtype == torch.float32


def test_what_is_clearly_faster_takes_its_place() -> None:
    even = (1.0, 1.0, 1.0)
    found = chosen(
        torch.bfloat16,
        OWN,
        bfloat16(own=1.0, single=0.5, plain=9.0, one=even),
        same_dtype=False,
    )
    assert found == PackForm(torch.float32)
    plain = bfloat16(own=1.0, single=1.0, plain=0.5, one=even)
    assert chosen(torch.bfloat16, OWN, plain, same_dtype=False) == PLAIN


def test_one_row_reads_the_weight_where_that_is_faster() -> None:
    def few(usual: PackForm, plain: float) -> int:
        own = None if usual == SINGLE else 1.0
        seconds = bfloat16(own=own, single=1.0, plain=9.0, one=(1.0, 1.0, plain))
        return chosen(torch.bfloat16, usual, seconds, same_dtype=False).plain_rows

    assert few(OWN, plain=0.7) == 1
    assert few(OWN, plain=0.9) == 0
    assert few(SINGLE, plain=1.1) == 1, "as usual, unless that is clearly slower"
    assert few(SINGLE, plain=1.4) == 0


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_each_form_that_a_weight_can_have_is_measured_and_draws_nothing(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    seconds = measure(dtype, (128, 64))
    assert list(seconds) == names_of(dtype)
    assert seconds.keys() >= {"float32", "plain"}
    assert ("bfloat16" in seconds) == (dtype == torch.bfloat16 and packs(CPU, dtype))
    assert all(len(row) == len(forms._ROWS) for row in seconds.values())
    assert all(0 < one < math.inf for row in seconds.values() for one in row)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The dtypes that are measured; the real thing is put back in place of the session's."""
    measured: list[torch.dtype] = []

    def quick(dtype: torch.dtype) -> dict[str, list[float]]:
        measured.append(dtype)
        return {name: [1.0, 1.0, 1.0] for name in names_of(dtype)}

    monkeypatch.setattr(forms, "measure", quick)
    monkeypatch.setattr(forms, "_seconds", MEASURED)
    forms._measured.cache_clear()
    yield measured
    forms._measured.cache_clear()


@needs_onednn
def test_it_is_measured_once_a_machine(tmp_path: Path, counted: list[torch.dtype]) -> None:
    for _ in range(2):
        found = measured_forms(CPU, [torch.bfloat16], same_dtype=False, directory=tmp_path / "c")
        assert found[torch.bfloat16].dtype == usual_forms(CPU)[torch.bfloat16].dtype
    assert counted == [torch.bfloat16]
    forms._measured.cache_clear()  # as another process
    measured_forms(CPU, [torch.bfloat16], same_dtype=True, directory=tmp_path / "c")
    assert counted == [torch.bfloat16]
    what = "products-bfloat16"
    assert read_seconds(tmp_path / "c", Machine.here(), what) is not None
    write_seconds(tmp_path / "c", Machine.here(), what, {"plain": [1.0, 1.0, 1.0]})
    measured_forms(CPU, [torch.bfloat16], same_dtype=True, directory=tmp_path / "c")
    assert counted == [torch.bfloat16] * 2, "one that lacks a form is no such measurement"


@needs_onednn
def test_without_a_disk_it_is_measured_once_a_process(counted: list[torch.dtype]) -> None:
    for _ in range(2):
        measured_forms(CPU, [torch.float32, torch.bfloat16], same_dtype=False, directory=None)
    assert counted == [torch.float32, torch.bfloat16]


def test_what_is_packed_nowhere_is_not_measured(counted: list[torch.dtype]) -> None:
    args = {"same_dtype": False, "directory": None}
    assert measured_forms(torch.device("meta"), [torch.bfloat16], **args) == {}
    assert measured_forms(CPU, [torch.float64], **args) == {}
    assert measured_forms(CPU, [], **args) == {}
    assert counted == []
