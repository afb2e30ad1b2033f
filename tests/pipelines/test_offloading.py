"""A pipeline with offloaded models gives the same images and tokens."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny_models import make_pipeline, make_prior


CPU = torch.device("cpu")
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def with_prior():
    return make_pipeline(prior=make_prior(text_hidden_size=None, num_classes=3))


def assert_same_as_plain(pipe):
    plain, options = with_prior(), {"num_inference_steps": 9, "output_type": "pt", "class_labels": [0, 1]}
    assert pipe.tokenize(IMAGES).equal(plain.tokenize(IMAGES))
    images, expected = (one(**options, generator=torch.Generator().manual_seed(0)).images for one in (pipe, plain))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("is_on_disk", [False, True])
def test_models_are_offloaded_in_groups(tmp_path, kind, is_on_disk):
    pipe = with_prior()
    options = {"offload_to_disk_path": tmp_path / "new"} if is_on_disk else {}
    pipe.enable_group_offload(CPU, offload_type=kind, num_blocks_per_group=1, **options)
    assert_same_as_plain(pipe)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_files_of_another_pipeline_in_the_folder_are_not_loaded(tmp_path, kind):
    other, pipe = with_prior(), with_prior()
    with torch.no_grad():
        for parameter in (*other.encoder.parameters(), *other.prior.parameters(), *other.decoder.parameters()):
            parameter.mul_(2)
    for one in (other, pipe):
        one.enable_group_offload(CPU, offload_type=kind, num_blocks_per_group=1, offload_to_disk_path=tmp_path)
    assert_same_as_plain(pipe)


def test_excluded_models_stay(tmp_path):
    pipe = with_prior()
    options = {"offload_type": "leaf_level", "offload_to_disk_path": tmp_path}
    pipe.enable_group_offload(CPU, exclude_modules=["encoder", "prior"], **options)
    assert [folder.name.split("_")[0] for folder in tmp_path.iterdir()] == ["decoder"]
    assert_same_as_plain(pipe)


@pytest.mark.parametrize(
    "offload", [lambda model, folder: cpu_offload(model, CPU), lambda model, folder: disk_offload(model, folder, CPU)]
)
@pytest.mark.parametrize("names", [["decoder"], ["encoder"], ["prior"], ["encoder", "decoder", "prior"]])
def test_accelerate_offloads_any_of_the_models(tmp_path, offload, names):
    pipe = with_prior()
    for name in names:
        offload(getattr(pipe, name), tmp_path / name)
    assert_same_as_plain(pipe)


def test_whole_models_are_offloaded_in_turn():
    pipe = with_prior()
    pipe.enable_model_cpu_offload(device="cpu")
    assert_same_as_plain(pipe)
