"""The embedded model: it loads, knows its prompts, and makes pictures of them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers", reason="the embedded model needs diffusers")

from PIL import Image  # noqa: E402

from agentsd.embedded import load  # noqa: E402


@pytest.fixture(scope="module")
def pipe():
    return load()


def test_the_unet_has_4096_tokens_and_both_attentions_at_every_level(pipe):
    seen = set()
    handles = [
        module.register_forward_pre_hook(lambda _, args, kind=name[-5:]: seen.add((kind, args[0].shape[1])))
        for name, module in pipe.unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    assert pipe.predict(pipe.noise([0]), 500, ["red apple"]).shape == (1, 4, 64, 64)
    for handle in handles:
        handle.remove()
    assert seen == {(kind, tokens) for kind in ("attn1", "attn2") for tokens in (4096, 1024, 256, 64)}


def test_pictures_are_those_of_their_prompts(pipe):
    """Few steps and few prompts, for time's sake; training/README.md has the count over all prompts in 20 steps."""
    index = list(range(0, len(pipe.prompts), 26))
    latents = pipe.sample([pipe.prompts[i] for i in index], steps=8, guidance=2.0)
    nearest, _ = pipe.nearest(latents)
    assert sum(int(n) == i for n, i in zip(nearest, index, strict=True)) >= len(index) - 1


def test_the_training_pictures_are_their_own_nearest(pipe):
    index, distance = pipe.nearest(pipe.latents_of(pipe.pictures))
    assert index.tolist() == list(range(len(pipe.prompts)))
    assert distance.max() < 1e-4
    image = pipe.decode(pipe.latents_of(pipe.pictures[:1]))[0]
    rgb = (255 * pipe.pictures[0, :3]).round().byte().permute(1, 2, 0)
    assert image.tobytes() == rgb.contiguous().numpy().tobytes()


def test_the_same_seed_gives_the_same_picture_alone_and_in_a_batch(pipe):
    alone = [pipe.sample(prompt, seed=5 + k, steps=2) for k, prompt in enumerate(["a Banana!", "the owl"])]
    both = pipe.sample(["banana", "owl"], seed=5, steps=2)
    torch.testing.assert_close(torch.cat(alone), both, atol=1e-3, rtol=1e-3)
    assert torch.equal(both, pipe.sample(["banana", "owl"], seed=5, steps=2))
    assert not torch.equal(both, pipe.sample(["banana", "owl"], seed=6, steps=2))


def test_seed_latents_size_and_callback(pipe):
    calls = []
    noise = pipe.noise([3], 32, 48)
    size = {"height": 32, "width": 48}
    images = pipe("rocket", steps=2, **size, guidance=1, latents=noise, callback=lambda *a: calls.append(a))
    assert [image.size for image in images] == [(48, 32)]
    assert isinstance(images[0], Image.Image)
    assert calls == [(1, 2), (2, 2)]
    again = pipe("rocket", seed=3, steps=2, **size, guidance=1)
    assert images[0].tobytes() == again[0].tobytes()
    unguided, without = (pipe.sample(prompt, steps=2, **size, guidance=g) for prompt, g in (("rocket", 0), ("", 1)))
    torch.testing.assert_close(unguided, without, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a purple hippo", "'purple'"), ("bananna", "banana"), ("red apple " * 5, "at most 8")],
)
def test_a_prompt_it_cannot_read_is_named(pipe, prompt, message):
    with pytest.raises(ValueError, match=message):
        pipe(prompt, steps=1)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 1001}, {"guidance": -1}, {"height": 60}, {"width": 8}])
def test_a_value_out_of_range_is_named(pipe, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} {next(iter(bad.values()))}, expected"):
        pipe("banana", **bad)
    with pytest.raises(ValueError, match="latents"):
        pipe("banana", latents=torch.zeros(1, 4, 32, 32))
