"""The η that a strength comes to, and the proposal."""

from dataclasses import replace

import pytest
import torch

from benchmarks import tune
from repulsion import Repulsion, repel
from sampler import Pipeline


def tokens(seed=0, groups=1):
    torch.manual_seed(seed)
    shared = torch.randn(groups, 1, 5, 24, dtype=torch.float64)
    return (shared + 0.2 * torch.randn(groups, 4, 5, 24, dtype=torch.float64)).flatten(0, 1)


def measured(**settings):
    return tune.Measured(**vars(Repulsion(**settings)))


@pytest.mark.parametrize("objective", ["vendi", "spread"])
@pytest.mark.parametrize("strength", [0.1, 1.0, 4.0])
def test_the_scale_pushes_as_far_as_the_strength(strength, objective):
    noting = measured(strength=strength, objective=objective)
    by_strength = noting.bind(0, 8)(tokens())
    by_scale = repel(tokens(), noting.scales[0], 1, objective=objective)
    torch.testing.assert_close(by_scale, by_strength, rtol=1e-10, atol=1e-10)  # float64


def test_the_scale_is_a_squared_length():
    scales = []
    for factor in (1, 10):
        noting = measured(strength=0.3)
        noting.bind(0, 8)(factor * tokens())
        scales += noting.scales
    assert scales[1] == pytest.approx(100 * scales[0])


def test_where_nothing_moves_there_is_no_scale():
    noting = measured(strength=0.3)
    noting.bind(0, 8)(torch.ones(3, 5, 24))
    assert not noting.scales and noting.bind(0, 8, num_context=2) is not None
    assert measured(strength=0.3, blocks=(1,)).bind(0, 8) is None


@pytest.mark.parametrize("branches,pushes", [("all", 2), ("conditional", 1)])
@pytest.mark.parametrize("single", ["all", "context"])
def test_every_push_is_noted_and_is_the_one_that_is_made(branches, pushes, single):
    settings = {"strength": 0.4, "branches": branches, "single_stream_tokens": single}
    noting, batch = measured(**settings), tokens(1, groups=2)
    assert torch.equal(noting.bind(0, 8, 2, 3)(batch), Repulsion(**settings).bind(0, 8, 2, 3)(batch))
    assert len(noting.scales) == pushes
    part = batch[-4:, :3] if single == "context" else batch[-4:]
    torch.testing.assert_close(repel(part, noting.scales[-1], 1), repel(part, None, 1, strength=0.4))


def test_the_proposal_is_the_largest_gain_that_keeps_the_prompt():
    base = {"vendi": 2.0, "adherence": 0.98}
    tried = {0.5: {"vendi": 2.2, "adherence": 0.98}, 1.0: {"vendi": 2.6, "adherence": 0.955},
             2.0: {"vendi": 3.0, "adherence": 0.94}}
    assert tune.propose(tried, base) == 1.0
    assert tune.propose(tried, {"vendi": 2.0, "adherence": None}) is None


def test_the_program_proposes_and_shows(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "STRENGTHS", (0.5,))
    monkeypatch.setattr("sys.argv", ["tune", "--prompts", "a circle", "--seeds", "1", "--images", "2",
                                     "--repel-steps", "1", "--out", str(tmp_path / "out")])
    assert tune.main() == 0
    printed = capsys.readouterr().out
    assert "| base |" in printed and "| 0.5 |" in printed
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["base.png", "strength-0.5.png", "summary.json"]
    monkeypatch.setattr("sys.argv", ["tune", "--blocks", "0-99"])
    assert tune.main() == 2 and "blocks end at 7" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["tune", "--images", "1"])
    assert tune.main() == 2 and "--images must be at least 2" in capsys.readouterr().err


def test_steps_take_the_place_of_a_noise_level(monkeypatch, tmp_path):
    class Found(Exception):
        pass

    def painted(pipeline, repulsion, *_):
        if repulsion:
            raise Found(repulsion)
        return {"vendi": 1.0, "adherence": None, "scales": [], "sheet": None}

    turbo = Pipeline.load("tiny-turbo")
    turbo.defaults = replace(turbo.defaults, repulsion=Repulsion(0.5, until=0.95))  # as FLUX.2-klein has it
    monkeypatch.setattr(tune.Pipeline, "load", lambda *_, **__: turbo)
    monkeypatch.setattr(tune, "paint", painted)
    monkeypatch.setattr("sys.argv", ["tune", "--repel-steps", "3", "--out", str(tmp_path / "out")])
    with pytest.raises(Found) as found:
        tune.main()
    (settings,) = found.value.args
    assert (settings.steps, settings.until, settings.iterations) == (3, None, 1)
