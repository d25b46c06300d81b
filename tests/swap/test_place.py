"""What the families of diffusers share when processors are put in place: parameters of the rotation, and norms known by their source."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import saccade
from saccade.swap.diffusers import _joint
from swap import models
from swap import models_joint as joint
from swap import models_ltx as ltx

FAMILIES = {
    "wan": (models.wan, models.wan_inputs),
    "ltx": (ltx.ltx, lambda model: ltx.ltx_inputs()),
    "hunyuan_video": (joint.hunyuan_video, joint.hunyuan_video_inputs),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [{"positions": "hope"}, {"positions": "hope", "gamma": 0.75}, {"gamma": 1.0}])
def test_other_positions_are_refused(family, params):
    """No parameter is ignored: the rotation stays stock and says why, and attention is swapped without it."""
    make, inputs = FAMILIES[family]
    model = make()
    given = inputs(model)
    stock = models.run(model, given)[0]
    rules = [{"kernel": "rotary", "params": params}]
    with saccade.accelerated(model, {"rules": rules}) as report:
        (row,) = report.skipped
        assert row.path == "rope" and row.reason.startswith(f"params.{', '.join(sorted(params))}: "), row
        assert not report.swapped and not report.applied
        assert torch.equal(models.run(model, given)[0], stock)
    rules.append({"kernel": "dense", "role": "[sj]*"})
    with saccade.accelerated(model, {"rules": rules}) as report:
        assert report.swapped and all(row.kind == "attention" for row in report.swapped)
        torch.testing.assert_close(models.run(model, given)[0], stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("known", [True, False])
def test_compiled_code_reads_known_norms_only(known, monkeypatch):
    """A norm whose source is not known runs as it is, compiled too; one that is known is fused with the rotation in both."""
    model = joint.hunyuan_video()
    given = joint.hunyuan_video_inputs(model)
    fused = []
    real = _joint.qk_norm_rope

    def counted(*args, **options):
        fused.append(torch.compiler.is_compiling())
        return real(*args, **options)

    monkeypatch.setattr(_joint, "qk_norm_rope", counted)
    if not known:
        monkeypatch.setattr(
            _joint, "_NORMS", {name: ({"another"}, keeps) for name, (_, keeps) in _joint._NORMS.items()}
        )
    stock = models.run(model, given)[0]
    torch._dynamo.reset()
    block = model.transformer_blocks[0]
    with saccade.accelerated(model, "lossless"):
        torch.testing.assert_close(models.run(model, given)[0], stock, rtol=1e-4, atol=1e-5)
        assert fused == [False] * (len(fused) if known else 0) and bool(fused) is known
        fused.clear()
        block.compile(fullgraph=False, backend="aot_eager")
        try:
            torch.testing.assert_close(models.run(model, given)[0], stock, rtol=1e-4, atol=1e-5)
        finally:
            block._compiled_call_impl = None
    assert (True in fused) is known
