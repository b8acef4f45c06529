"""Backbones, the CIFAR networks and PixelModel."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ham_hf.models import (
    PixelModel,
    Preprocessing,
    create_backbone,
    input_defaults,
    load_pixel_model,
    source as model_source,
)
from ham_hf.models.cifar_nets import default_cfgs
from tests.support.exports import preprocessing
from tests.support.tables import cases

MEAN, STD = preprocessing().mean, preprocessing().std
MEAN_OF_PIXELS, STD_OF_PIXELS = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
# Small versions of the four networks: same code, few channels.
SMALL = {
    "resnet18_cifar": {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]},
    "preactresnet18_cifar": {"layers": [2, 1, 1, 1], "channels": [8, 16, 16, 24], "stem_chs": 8},
    "wideresnet28_10_cifar": {"layers": [2, 1, 1], "channels": [16, 24, 32], "stem_chs": 8},
    "wideresnet34_10_cifar": {"layers": [1, 2, 1], "channels": [16, 24, 32], "stem_chs": 8},
}


def backbone_of(name, *, size=32, in_chans=3, **model_args):
    inputs = preprocessing(size, in_chans)
    return create_backbone(name, pretrained=False, num_classes=10, preprocessing=inputs, model_args=model_args)


def randomize(model, seed=0):
    """Weights and running statistics unlike those of initialization, so that nothing is hidden by zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """A Hub of one model, in a folder; what is asked of it."""
    asked = []

    def download(hub_id, filename):
        asked.append((hub_id, filename))
        if (tmp_path / filename).is_file():
            return str(tmp_path / filename)
        raise OSError("404 Client Error.\nEntry Not Found")

    monkeypatch.setattr(model_source, "download_from_hf", download)
    return asked


class TestCifarNets:
    @pytest.mark.parametrize(
        ("name", "num_parameters"),
        [
            ("resnet18_cifar", 11_173_962),
            ("preactresnet18_cifar", 11_172_170),
            ("wideresnet28_10_cifar", 36_479_194),
            ("wideresnet34_10_cifar", 46_160_474),
        ],
    )
    def test_parameter_counts_of_the_literature(self, name, num_parameters):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters

    @pytest.mark.parametrize("name", SMALL)
    def test_stem_keeps_the_resolution(self, name):
        model = timm.create_model(name, features_only=True, **SMALL[name])
        features = model(torch.rand(1, 3, 32, 32))
        sides = [feature.shape[-1] for feature in features]
        assert sides == [32 // reduction for reduction in model.feature_info.reduction()]
        assert sides == ([32, 32, 16, 8, 4] if "net18" in name else [32, 32, 16, 8])
        assert [feature.shape[1] for feature in features] == model.feature_info.channels()

    def test_resnet_computes_what_timm_s_resnet_does_behind_the_stem(self):
        ours = randomize(timm.create_model("resnet18_cifar", num_classes=10, **SMALL["resnet18_cifar"])).eval()
        theirs = timm.create_model("resnet18", num_classes=10, **SMALL["resnet18_cifar"]).eval()
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "conv1.weight"}, strict=False)
        x = torch.rand(2, 3, 32, 32)
        stem = F.relu(theirs.bn1(F.conv2d(x, ours.conv1.weight, stride=1, padding=1)))
        expected = theirs.forward_head(theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(stem)))))
        torch.testing.assert_close(ours(x), expected)

    @pytest.mark.parametrize("name", ["preactresnet18_cifar", "wideresnet28_10_cifar"])
    def test_pre_activation_networks_are_those_of_the_papers(self, name):
        """Against the definition: shortcuts start behind the first norm and ReLU; norm and ReLU before pooling."""
        model = randomize(timm.create_model(name, num_classes=10, **SMALL[name])).eval()
        state = model.state_dict()

        def norm_relu(x, prefix):
            keys = ("running_mean", "running_var", "weight", "bias")
            return F.relu(F.batch_norm(x, *(state[f"{prefix}.{key}"] for key in keys)))

        x = torch.rand(2, 3, 32, 32)
        out = F.conv2d(x, state["stem.conv.weight"], padding=1)
        for stage, depth in enumerate(SMALL[name]["layers"]):
            for index in range(depth):
                block, stride = f"stages.{stage}.blocks.{index}", 2 if stage and not index else 1
                pre = norm_relu(out, f"{block}.norm1")
                projection = state.get(f"{block}.downsample.conv.weight")
                shortcut = out if projection is None else F.conv2d(pre, projection, stride=stride)
                hidden = F.conv2d(pre, state[f"{block}.conv1.weight"], stride=stride, padding=1)
                hidden = F.conv2d(norm_relu(hidden, f"{block}.norm2"), state[f"{block}.conv2.weight"], padding=1)
                out = shortcut + hidden
        pooled = norm_relu(out, "norm").mean((2, 3))
        expected = pooled @ state["head.fc.weight"].flatten(1).T + state["head.fc.bias"]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", SMALL)
    def test_timm_interface(self, name):
        options = {"in_chans": 1, "drop_path_rate": 0.1, "global_pool": "max", **SMALL[name]}
        model = timm.create_model(name, num_classes=5, **options)
        x = torch.rand(2, 1, 32, 32)
        features = model.eval().forward_features(x)
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert model.get_classifier() is not None
        plain = model(x)
        model.set_grad_checkpointing(True)
        torch.testing.assert_close(model(x), plain)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)

    @pytest.mark.parametrize("name", ["resnet18_cifar", "preactresnet18_cifar"])
    def test_output_stride_dilates(self, name):
        model = timm.create_model(name, output_stride=4, **SMALL[name])
        assert model.forward_features(torch.rand(1, 3, 32, 32)).shape[-1] == 8

    @pytest.mark.parametrize("name", SMALL)
    def test_arguments_that_would_reshape_the_stem_are_refused(self, name):
        with pytest.raises(TypeError, match=r"fixed 3x3 stem .* stem_type"):
            timm.create_model(name, stem_type="deep")

    @pytest.mark.parametrize("name", SMALL)
    def test_default_configuration(self, name):
        assert name in timm.list_models()
        defaults = input_defaults(name, model_args={})
        assert (defaults.image_size, defaults.in_chans, defaults.crop_pct) == (32, 3, 1.0)
        with pytest.raises(RuntimeError, match="No pretrained weights"):
            timm.create_model(name, pretrained=True, **SMALL[name])

    def test_small_versions_cover_all(self):
        assert SMALL.keys() == default_cfgs.keys()


class TestPreprocessing:
    @pytest.mark.parametrize(("change", "message"), cases(__file__, "bad_preprocessing.yaml"))
    def test_out_of_range(self, change, message):
        values = {"image_size": 32, "in_chans": 3, "interpolation": "bilinear", "crop_pct": 1.0}
        with pytest.raises(ValueError, match=message):
            Preprocessing(**{**values, "mean": MEAN, "std": STD, **change})

    def test_grayscale_defaults_average_the_channels(self):
        defaults = input_defaults("test_resnet", model_args={"in_chans": 1})
        color = input_defaults("test_resnet", model_args={})
        assert (defaults.in_chans, color.in_chans) == (1, 3)
        assert defaults.mean == pytest.approx((sum(color.mean) / 3,))
        assert defaults.std == pytest.approx((sum(color.std) / 3,))


class TestPixelModel:
    @pytest.fixture
    def backbone(self):
        return randomize(backbone_of("resnet18_cifar", **SMALL["resnet18_cifar"])).eval()

    @pytest.fixture
    def x(self):
        return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def test_normalises_inside(self, backbone, x):
        assert torch.equal(PixelModel(backbone, MEAN, STD)(x), backbone((x - MEAN_OF_PIXELS) / STD_OF_PIXELS))

    def test_gradient_is_in_pixel_units(self, backbone, x):
        x.requires_grad_()
        normalised = ((x.detach() - MEAN_OF_PIXELS) / STD_OF_PIXELS).requires_grad_()
        (gradient,) = torch.autograd.grad(PixelModel(backbone, MEAN, STD)(x).logsumexp(1).sum(), x)
        (inner,) = torch.autograd.grad(backbone(normalised).logsumexp(1).sum(), normalised)
        torch.testing.assert_close(gradient, inner / STD_OF_PIXELS)

    def test_upsampling_repeats_pixels(self, x):
        model = PixelModel(nn.Identity(), MEAN, STD, upsample=4)
        enlarged = x.repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert torch.equal(model(x), PixelModel(nn.Identity(), MEAN, STD)(enlarged))

    def test_state_dict_is_the_backbone_s(self, backbone):
        model = PixelModel(backbone, MEAN, STD)
        assert model.state_dict().keys() == {f"backbone.{key}" for key in backbone.state_dict()}
        assert {name for name, _ in model.named_buffers() if "." not in name} == {"mean", "std"}
        assert model.mean.dtype == model.std.dtype == torch.float32

    def test_autocast_normalises_in_float32(self, backbone, x):
        model, seen = PixelModel(backbone, MEAN, STD), []
        backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        assert logits.dtype == torch.bfloat16
        assert seen[0].dtype == torch.float32
        assert torch.equal(seen[0], (x - model.mean) / model.std)

    def test_compiles(self, backbone, x):
        model = PixelModel(backbone, MEAN, STD)
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


class TestCreateBackbone:
    def test_image_size_reaches_the_architecture(self):
        assert backbone_of("test_vit", size=48).patch_embed.img_size == (48, 48)

    def test_train_mode_and_arguments(self):
        model = backbone_of("test_resnet", drop_rate=0.3, in_chans=1)
        assert model.training
        assert model.drop_rate == 0.3
        assert model.conv1[0].in_channels == 1

    @pytest.mark.parametrize(("name", "options", "message"), cases(__file__, "bad_names.yaml"))
    def test_bad_names_and_arguments(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            create_backbone(name, pretrained=False, num_classes=10, preprocessing=preprocessing(), model_args=options)

    def test_size_that_the_architecture_cannot_take(self):
        with pytest.raises(ValueError, match=r"test_vit does not run on 8x8 images: .*--image_size .*patch_size=4"):
            backbone_of("test_vit", size=8)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("resnet18_cifar", "no pretrained weights"), ("gcvit_xxtiny", "only as a pickle, which is never loaded")],
    )
    def test_no_safe_weights(self, name, message):
        with pytest.raises(ValueError, match=message):
            create_backbone(name, pretrained=True, num_classes=10, preprocessing=preprocessing(), model_args={})

    def test_registered_weights_come_from_safetensors(self, downloads, tmp_path):
        """Pretrained weights of a timm name: fetched as safetensors, classifier and channels adapted by timm."""
        source = randomize(timm.create_model("test_convnext"))
        save_file(source.state_dict(), tmp_path / "model.safetensors")
        model = create_backbone(
            "test_convnext", pretrained=True, num_classes=7, preprocessing=preprocessing(in_chans=1), model_args={}
        )
        assert downloads == [("timm/test_convnext.r160_in1k", "model.safetensors")]
        torch.testing.assert_close(model.stem[0].weight, source.stem[0].weight.sum(1, keepdim=True))
        assert torch.equal(model.stages[0].blocks[0].conv_dw.weight, source.stages[0].blocks[0].conv_dw.weight)
        assert model.get_classifier().out_features == 7
        assert "state_dict" not in model.pretrained_cfg


class TestLoadPixelModel:
    @pytest.mark.parametrize(("source", "revision", "message"), cases(__file__, "bad_sources.yaml"))
    def test_bad_sources(self, source, revision, message):
        with pytest.raises(ValueError, match=message):
            load_pixel_model(source, revision=revision)

    def test_checkpoint_of_a_run_points_to_the_exported_model(self, tmp_path):
        self.write_config(tmp_path / "run")
        for name in ("checkpoint-best", "checkpoint-20"):
            (tmp_path / "run" / name).mkdir()
            with pytest.raises(ValueError, match=rf"{name} has no config.json; .* try {tmp_path / 'run'}$"):
                load_pixel_model(str(tmp_path / "run" / name))
        (tmp_path / "lone").mkdir()
        with pytest.raises(ValueError, match=r"as timm writes them$"):
            load_pixel_model(str(tmp_path / "lone"))

    def test_timm_name(self):
        loaded = load_pixel_model("test_resnet", pretrained=False)
        assert loaded.class_names is None
        assert loaded.metadata == {}
        assert not loaded.model.training
        assert loaded.preprocessing == input_defaults("test_resnet", model_args={})
        assert loaded.model(torch.rand(1, 3, 160, 160)).shape == (1, 1000)

    def write_config(self, folder, **pretrained_cfg):
        folder.mkdir(exist_ok=True)
        cfg = {"input_size": [3, 32, 32], "num_classes": 1000, **pretrained_cfg}
        (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": cfg}))

    def test_damaged_weights(self, tmp_path):
        self.write_config(tmp_path)
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ValueError, match="damaged, or a Git LFS pointer"):
            load_pixel_model(str(tmp_path))

    def test_hub(self, downloads, tmp_path):
        self.write_config(tmp_path, label_names={"0": "tench"})
        weights = timm.create_model("test_resnet").state_dict()
        save_file(weights, tmp_path / "model.safetensors")
        loaded = load_pixel_model("me/model", revision="v1")
        assert downloads == [("me/model@v1", "config.json"), ("me/model@v1", "model.safetensors")]
        assert torch.equal(loaded.model.backbone.fc.weight, weights["fc.weight"])
        assert loaded.class_names is not None
        assert loaded.class_names[:2] == ("tench", "1")

    @pytest.mark.parametrize(("written", "found"), [("me/base", "me/base"), ("a--b/c..d", None), ("base", None)])
    def test_a_card_names_a_base_model_by_an_id_that_the_hub_has(self, tmp_path, written, found):
        self.write_config(tmp_path)
        (tmp_path / "README.md").write_text(f"---\nbase_model: {written}\n---\n")
        assert model_source.read_origin(str(tmp_path)).base_model == found

    def test_hub_without_the_files(self, downloads, tmp_path):
        with pytest.raises(ValueError, match=r"config\.json of outputs/nothing .*no folder of that name .*404 Client"):
            load_pixel_model("outputs/nothing")
        self.write_config(tmp_path)
        with pytest.raises(ValueError, match=r"could not get model\.safetensors of me/m .*pickled weights are never"):
            load_pixel_model("me/m")
