"Corruptions: the reference's parameters against PIL, determinism, severities, and what is refused."
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_digits

from rdd_nb.corruptions import LADDER, REFERENCE, as_corruptions, corrupt, show_corruptions

NAMES = [f'{k}-{s}' for k in LADDER for s in (1, 5)] + list(REFERENCE)


def pictures(n=4, channels=1, size=(28, 28), seed=0):
    "Smooth blobs, so that blurring and moving them shows; eight-bit."
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.interpolate(torch.rand(n, channels, 5, 4, generator=g), size, mode='bicubic').clamp(0, 1)
    return (x * 255).round() / 255


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('channels, size', [(1, (8, 8)), (3, (32, 32)), (3, (20, 28))], ids=str)
def test_every_corruption_gives_other_pixels_of_the_same_kind(name, channels, size):
    x = pictures(3, channels, size)
    before, state = x.clone(), torch.get_rng_state()
    out = corrupt(x, name)
    assert out.shape == x.shape and out.dtype == x.dtype and 0 <= out.min() and out.max() <= 1 and out.isfinite().all()
    assert not torch.equal(out, x) and torch.equal(x, before) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(out, corrupt(x, name)) and torch.equal(out[1], corrupt(x, name)[1])


def test_chance_goes_by_name_seed_and_image():
    x = pictures(1).repeat(6, 1, 1, 1)
    for name in ('noise', 'shot', 'impulse', 'motion', 'elastic', 'shift', 'cover', 'reference-noise'):
        out = corrupt(x, name)
        assert any(not torch.equal(out[0], o) for o in out[1:]), name
        assert not torch.equal(out, corrupt(x, name, seed=1)), name
    turned = corrupt(x, 'rotation')                                                    # one way or the other
    assert len({o.sum().item() for o in turned}) == 2


@pytest.mark.parametrize('name', LADDER)
def test_severities_rise(name):
    "On digits of two sizes the damage grows from step to step, on average (blocks of pixels may fit by luck)."
    digits = torch.tensor(load_digits().images[:300, None] / 16).float()
    for x in (digits, torch.nn.functional.interpolate(digits, (28, 28), mode='bilinear')):
        damage = [float((corrupt(x, f'{name}-{s}') - x).abs().mean()) for s in range(1, 6)]
        assert damage[0] > 0 and damage[4] > 1.5 * damage[0]
        assert all(b > a * (.85 if name == 'pixelate' else 1) for a, b in zip(damage, damage[1:])), damage


# The reference's parameters

@pytest.mark.parametrize('channels', [1, 3])
def test_reference_blur_and_inversion_are_those_of_pil(channels):
    x = pictures(5, channels, (32, 32))
    for image, blurred, inverted in zip(x, corrupt(x, 'reference-blur'), corrupt(x, 'reference-invert')):
        eight = image.mul(255).round().byte().permute(1, 2, 0).numpy()
        pil = Image.fromarray(eight[..., 0] if channels == 1 else eight)
        for f, ours in ((lambda im: im.filter(ImageFilter.GaussianBlur(radius=2)), blurred),
                        (ImageOps.invert, inverted)):
            expected = np.asarray(f(pil)).reshape(32, 32, channels)
            assert np.array_equal(ours.mul(255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_reference_noise():
    grey = torch.full((400, 1, 28, 28), .5)
    for name, sd in (('reference-noise', .005**.5), ('reference-noise-imagenet', .2)):
        noise = corrupt(grey, name) - .5
        # the median does not mind clipping
        assert noise.mean().abs() < 2e-3 and noise.abs().median() == pytest.approx(.6744898 * sd, rel=.01)
    assert corrupt(torch.zeros(1, 1, 8, 8), 'reference-noise').min() == 0


def test_levels_mean_what_they_say():
    x = torch.full((50, 1, 40, 40), .5)
    assert corrupt(x, 'noise-2').sub(.5).std() == pytest.approx(.12, rel=.02)
    changed = (corrupt(x, 'impulse-4') != x).float().mean()
    assert changed == pytest.approx(.12, abs=.01) and set(corrupt(x, 'impulse-4').unique().tolist()) == {0., .5, 1.}
    assert corrupt(x, 'brightness-3').unique().tolist() == pytest.approx([.8])
    assert (corrupt(torch.zeros(9, 3, 40, 40), 'cover-5') == .5).float().mean() == pytest.approx((25 / 40)**2)
    column = torch.zeros(30, 1, 40, 40); column[..., 20] = 1
    assert corrupt(column, 'contrast-5').std() == pytest.approx(.2 * column.std().item(), rel=1e-3)
    dot = torch.zeros(200, 1, 41, 41); dot[..., 20, 20] = 1
    where = corrupt(dot, 'shift-5').flatten(1).argmax(1)
    distance = torch.hypot(where // 41 - 20., where % 41 - 20.)
    assert distance.mean() == pytest.approx(.15 * 41, abs=.5) and distance.std() < .6
    bar = torch.zeros(1, 1, 81, 81); bar[..., 38:43, :] = 1
    from rdd_nb.corruptions import rotation
    assert torch.allclose(rotation(bar, 90, torch.Generator().manual_seed(0)), bar.transpose(2, 3), atol=.02)


# What is refused

@pytest.mark.parametrize('args, word', [
    ((pictures(), 'nois-3'), 'noise'), ((pictures(), 'fog'), 'choose from'), ((pictures(), 'noise-0'), '1 to 5'),
    ((pictures(), 'noise-6'), '1 to 5'), ((pictures(), 'noise-33'), 'not known|1 to 5'),
    ((pictures(), ''), 'not known'), ((pictures()[0], 'noise'), r'\(n, C, H, W\)'),
    ((torch.rand(5, 3), 'noise'), 'tables'), ((pictures() * 255, 'noise'), r'\[0, 1\]'),
    ((pictures() - 1, 'noise'), r'\[0, 1\]'),
    ((np.zeros((2, 1, 8, 8)), 'noise'), 'ndarray'), ((torch.rand(2, 2, 8, 8), 'jpeg'), '1 or 3 channels'),
], ids=lambda v: v[1] if isinstance(v, tuple) else None)
def test_input_that_does_not_fit(args, word):
    with pytest.raises(ValueError, match=word) as e: corrupt(*args)
    assert '\n' not in str(e.value)


def test_lists_of_corruptions():
    assert list(as_corruptions('common')) == [f'{k}-3' for k in LADDER]
    assert list(as_corruptions('reference')) == list(REFERENCE)
    assert list(as_corruptions(['noise-1', 'reference', 'noise-1'])) == ['noise-1', *REFERENCE]
    x = pictures()
    assert torch.equal(as_corruptions('noise-4')['noise-4'](x), corrupt(x, 'noise-4'))
    for bad in ('noise fog', ['noise-9'], dict(mine=3)):
        with pytest.raises(ValueError): as_corruptions(bad)


def test_the_sheet():
    import matplotlib.pyplot as plt
    for channels in (1, 3):
        axes = show_corruptions(pictures(1, channels)[0], ['noise', 'blur'])
        assert axes.shape == (2, 6) and [a.get_title() for a in axes[0]] == ['clean', '1', '2', '3', '4', '5']
        assert axes[1, 0].get_ylabel() == 'blur'
    plt.close('all')
