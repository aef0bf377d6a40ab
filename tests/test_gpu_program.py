"""What a GPU would run, counted in programs written by hand; every training step can be made for one."""

import re

import jax
import jax.numpy as jnp
import pytest

from dhlnn_jax import gpu_program, workload
from dhlnn_jax.benchmark import main
from dhlnn_jax.gpu_program import count_kernels
from dhlnn_jax.methods import METHODS
from dhlnn_jax.train import make_train_block

TRAINED = [name for name, method in METHODS.items() if method.trained]

PROGRAM = """HloModule jit_f, is_scheduled=true

%body (carry: (s32[], f32[10])) -> (s32[], f32[10]) {
  %carry = (s32[], f32[10]{0}) parameter(0)
  %x = f32[10]{0} get-tuple-element(%carry), index=1
  %y = f32[10]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[10]{0}) tuple(%i, %y)
}

%condition (carry: (s32[], f32[10])) -> pred[] {
  ROOT %go_on = pred[] fusion(%carry.2), kind=kLoop, calls=%fused.2
}

ENTRY %main (a: f32[10], mask: pred[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %mask = pred[10]{0} parameter(1)
  %b = (f32[10]{0}, bf16[2,3]{1,0}) fusion(%a, %mask), kind=kInput, calls=%fused.3, metadata={op_name="f(%a)"}
  %c = f32[10]{0} get-tuple-element(%b), index=0
  %d = (s32[], f32[10]{0}) tuple(%zero, %c)
  %e = (s32[], f32[10]{0}) while(%d), condition=%condition, body=%body LENGTH
  ROOT %f = f32[10]{0} copy(%c)
}
"""


def test_kernels_and_what_they_move_are_counted():
    # a fusion: 40 + 10 bytes in, 40 + 12 out; one of the loop's: 40 + 40; a copy: 40 + 40
    assert count_kernels(PROGRAM) == (3, pytest.approx((102 + 80 + 80) / 1e9))


def test_loop_of_known_length_counts_as_often_as_it_runs():
    known = PROGRAM.replace("LENGTH", ', backend_config={"known_trip_count":{"n":"30"}}')
    assert count_kernels(known) == (1 + 30 + 1, None)  # what a turn of a loop sees of an array is not known


def test_kernels_of_a_real_program():
    def loop(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jnp.sin(x) @ x, x)

    compiled = jax.jit(loop).lower(jnp.ones((8, 8))).compile().as_text()
    once = jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8))).compile().as_text()
    assert 7 * count_kernels(once).launched <= count_kernels(compiled).launched


@pytest.mark.parametrize("method", TRAINED)
def test_training_can_be_made_for_a_gpu_and_never_asks_the_host(method):
    work = workload.make_workload(workload.step_config(64), method=method, chunk=0, n_devices=1)
    arguments = jax.eval_shape(lambda: (work.init(0), jax.random.key(0), work.settings, jnp.int32(0)))
    traced = jax.jit(make_train_block(work.step, max_epochs=4)).trace(*arguments)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = set(re.findall(r"custom_call @([\w.$]+)", program))
    assert calls <= {"cusolver_potrf_ffi"}  # a callback to Python would be another


def test_without_a_compiler_for_gpus_it_says_how_to_get_one(monkeypatch, capsys):
    def none(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(gpu_program.topologies, "get_topology_desc", none)
    assert main(["program"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'dhlnn_jax[cuda]'" in said and "JAX_PLATFORMS=cpu" in said and said.count("\n") == 1


def test_answer_has_a_row_for_every_method_and_clamp(monkeypatch, capsys, tmp_path):
    counted = {"median": 85, "min": 85, "max": 85, "unit": "kernels", "temporaries": 2**20}
    for row in ({"gigabytes": 2.98, "milliseconds_of_memory": 0.89}, dict.fromkeys(
        ("gigabytes", "milliseconds_of_memory")
    )):  # fmt: skip
        monkeypatch.setattr(gpu_program, "_described_h100", lambda: jax.devices()[0])
        monkeypatch.setattr(gpu_program, "_counted", lambda *_, row=row: counted | row)
        assert main(["program", "--json", str(tmp_path / "x.json"), "--overwrite"]) == 0
        out = capsys.readouterr().out
        assert ("2.98" in out) == (row["gigabytes"] is not None)
        assert "dhntb, parallel" in out and "dhlnn, scan" in out and "dhmlp " in out
