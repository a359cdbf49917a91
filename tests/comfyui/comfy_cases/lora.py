"""The LoRA loader inside ComfyUI: the same change as core's loader, experts and windows at run time."""

from __future__ import annotations

import json

import torch

from . import case

HIDDEN = 96
WIDTHS = {"in_channels": 96, "hidden_size": HIDDEN, "num_heads": 6, "axes_dim": [4, 6, 6]}


def tiny_flux(in_channels: int = 96, seed: int = 0, storage: torch.dtype = torch.float32):
    """A FLUX with every parameter written (comfy's layers are born uninitialised), as a ModelPatcher."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = {"image_model": "flux", "out_channels": 16, "patch_size": 2, "vec_in_dim": 32}
    config |= {"context_in_dim": 32, "mlp_ratio": 4.0, "depth": 1, "depth_single_blocks": 1, "theta": 10000}
    config |= {"qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], **WIDTHS}
    config["in_channels"] = in_channels
    if "txt_ids_dims" not in _flux_parameters():
        del config["txt_ids_dims"]
    family = comfy.supported_models.FluxInpaint if in_channels == 96 else comfy.supported_models.Flux
    conf = family(config)
    conf.set_inference_dtype(storage, None if storage == torch.float32 else torch.float32)
    model = conf.get_model({}, "").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)
    load = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load, comfy.model_management.unet_offload_device())


def _flux_parameters():
    from comfy.ldm.flux.model import FluxParams

    return FluxParams.__dataclass_fields__


def predict(patcher, sigma: float = 0.7, low_memory: bool = False):
    """x0 of one model call, through the real load and wrapper path."""
    import comfy.model_management
    import comfy.patcher_extension
    import comfy.sampler_helpers

    options = {"transformer_options": {}}
    comfy.sampler_helpers.prepare_model_patcher(patcher, {}, options)
    extra = patcher.get_nested_additional_models()
    with torch.inference_mode():  # as the executor runs
        comfy.model_management.load_models_gpu([patcher, *extra])
        if low_memory:
            patcher.partially_unload(patcher.offload_device, patcher.model_size() // 2)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    extra_channels = patcher.model.diffusion_model.img_in.weight.shape[1] // 4 - 16
    concat = torch.randn(1, extra_channels, 8, 8, generator=generator) if extra_channels else None
    with torch.inference_mode():
        return patcher.model.apply_model(
            x,
            torch.tensor([sigma]),
            c_concat=concat,
            c_crossattn=torch.randn(1, 5, 32, generator=generator),
            y=torch.randn(1, 32, generator=generator),
            guidance=torch.tensor([30.0]),
            transformer_options=options["transformer_options"],
        )


def layers(in_tokens: int = 384) -> dict[str, tuple[int, int]]:
    h, double, single = HIDDEN, "transformer_blocks.0.", "single_transformer_blocks.0."
    return {
        "x_embedder": (h, in_tokens),
        **{f"{double}attn.{n}": (h, h) for n in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj")},
        f"{double}norm1.linear": (6 * h, h),
        f"{double}ff.net.2": (h, 4 * h),
        **{f"{single}attn.{n}": (h, h) for n in ("to_q", "to_k", "to_v")},
        f"{single}proj_mlp": (4 * h, h),
        f"{single}proj_out": (h, 5 * h),
        "norm_out.linear": (2 * h, h),
    }


def factors(shapes: dict, rank: int = 4, seed: int = 1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, i, generator=generator) * 0.1,
            torch.randn(o, rank, generator=generator) * 0.1,
        )
        for name, (o, i) in shapes.items()
    }


def weights_of(host, pairs, scale: float = 1.0, **info):
    lora = host.pack("models.lora")
    modules = {name: lora.LowRank(a, b, scale) for name, (a, b) in pairs.items()}
    return lora.LoraWeights(modules, {}, lora.LoraInfo(**info))


def experts_of(
    host, seed: int = 3, names=("transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out")
):
    lora, generator = host.pack("models.lora"), torch.Generator().manual_seed(seed)
    modules = {}
    for name in names:
        out, width = layers()[name]
        shapes = ((4, 3, width), (4, out, 3), (4, width))
        modules[name] = lora.MoeLowRank(
            *(torch.randn(s, generator=generator) * 0.2 for s in shapes), scale=0.5
        )
    return lora.LoraWeights(modules, {}, lora.LoraInfo())


def moe_modules(host):
    return experts_of(host).modules.values()


def apply(host, model, weights, strength=1.0, **options):
    with torch.inference_mode():
        return host.pack("models.lora").apply_to_comfy(model, weights, strength, **options)


def change(a, b) -> float:
    return float((a - b).abs().max())


@case
def plain_loras_equal_cores_own_loader(host):
    import comfy.sd

    model, pairs = tiny_flux(), factors(layers())
    core = {}
    for name, (a, b) in pairs.items():
        core |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        core[f"transformer.{name}.alpha"] = torch.tensor(2.0)
    theirs, _ = comfy.sd.load_lora_for_models(model, None, core, 0.7, 0)
    base = predict(model)
    want = predict(theirs)
    ours, report = apply(host, model, weights_of(host, pairs, 2 / 4), 0.7)
    got = predict(ours)
    assert change(got, want) < 1e-5 and change(got, base) > 1e-2
    assert set(report.loaded) == set(pairs) and not report.skipped and not report.runtime
    assert torch.equal(predict(model), base)


@case
def experts_equal_the_loop_over_experts_inside_the_model(host):
    model, moe = tiny_flux(), experts_of(host)
    base = predict(model)
    patched, report = apply(host, model, moe, 0.8)
    got = predict(patched)
    hooks = []

    def loop(m):
        def add(layer, args, y):
            x, y = args[0], y.clone()
            chosen = (x @ m.router.T).argmax(-1)
            for b, t in [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1])]:
                e = chosen[b, t]
                y[b, t] += 0.8 * m.scale * (m.B[e] @ (m.A[e] @ x[b, t]))
            return y

        return add

    flux = model.model.diffusion_model
    for layer, name in (
        (flux.double_blocks[0].img_mlp[2], "transformer_blocks.0.ff.net.2"),
        (flux.single_blocks[0].linear2, "single_transformer_blocks.0.proj_out"),
    ):
        hooks.append(layer.register_forward_hook(loop(moe.modules[name])))
    want = predict(model)
    for hook in hooks:
        hook.remove()
    assert change(got, want) < 1e-5 and change(got, base) > 1e-2
    assert set(report.runtime) == set(moe.modules)


@case
def the_shared_module_is_never_left_changed(host):
    model = tiny_flux()
    before = {k: t.clone() for k, t in model.model.state_dict().items()}
    base = predict(model)
    patched, _ = apply(host, model, experts_of(host))
    predict(patched)
    assert all(not m._forward_hooks for m in model.model.modules())
    assert torch.equal(predict(model), base)
    assert model.patches == {} and model.wrappers.get("apply_model", {}) == {} and not model.additional_models
    assert all(torch.equal(t, before[k]) for k, t in model.model.state_dict().items())


@case
def hooks_come_off_when_the_model_call_fails(host):
    import comfy.model_management

    model = tiny_flux()
    patched, _ = apply(host, model, experts_of(host))

    def fail(layer, args, y):
        raise comfy.model_management.InterruptProcessingException()

    hook = model.model.diffusion_model.final_layer.register_forward_hook(fail)
    try:
        predict(patched)
        raise AssertionError("the interruption was swallowed")
    except comfy.model_management.InterruptProcessingException:
        pass
    hook.remove()
    assert all(not m._forward_hooks for m in model.model.modules())


@case
def loras_stack_in_any_order(host):
    import comfy.sd

    model, plain, moe = tiny_flux(), weights_of(host, factors(layers())), experts_of(host)
    second = experts_of(host, seed=8)
    a = apply(host, apply(host, model, plain)[0], moe)[0]
    b = apply(host, apply(host, model, moe)[0], plain)[0]
    assert change(predict(a), predict(b)) < 1e-5
    both = apply(host, apply(host, model, moe)[0], second)[0]
    other = apply(host, apply(host, model, second)[0], moe)[0]
    assert change(predict(both), predict(other)) < 1e-5
    assert change(predict(both), predict(apply(host, model, moe)[0])) > 1e-3
    name = "transformer_blocks.0.ff.net.2"
    (A, B), key = factors({name: layers()[name]})[name], f"transformer.{name}"
    core = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    same_layer, _ = comfy.sd.load_lora_for_models(apply(host, model, moe)[0], None, core, 1.0, 0)
    ours = apply(host, apply(host, model, weights_of(host, {name: (A, B)}))[0], moe)[0]
    assert change(predict(same_layer), predict(ours)) < 1e-5


def sigmas():
    return ["0.95", "0.9", "0.5", "0.4", "0.1"]


@case(each=sigmas)
def a_window_equals_merged_weights_inside_and_the_base_outside(host, sigma):
    sigma, model = float(sigma), tiny_flux()
    weights = weights_of(host, factors(layers()), 0.5)
    windowed, report = apply(host, model, weights, 0.7, window=(0.9, 0.4))
    got = predict(windowed, sigma)
    merged, _ = apply(host, model, weights, 0.7)
    want = predict(merged if 0.9 >= sigma > 0.4 else model, sigma)
    assert change(got, want) < 1e-5
    assert report.window == (0.9, 0.4) and set(report.runtime) == set(weights.modules)


@case
def everything_works_with_half_the_model_offloaded(host):
    model = tiny_flux()
    weights = weights_of(host, factors(layers()), 0.5)
    stacked = apply(host, apply(host, model, weights)[0], experts_of(host))[0]
    want = predict(stacked)
    assert change(predict(stacked, low_memory=True), want) < 1e-5
    windowed = apply(host, model, weights, window=(0.9, 0.4))[0]
    want = predict(windowed)
    assert change(predict(windowed, low_memory=True), want) < 1e-5


@case
def run_time_tensors_are_counted_by_comfyui(host):
    model = tiny_flux()
    patched, _ = apply(host, model, experts_of(host))
    (extra,) = patched.get_nested_additional_models()
    # per layer: 4 experts of rank 3 and 4 router rows, in 32 rows of the input's width; 12 columns back
    assert extra.model_size() == sum(4 * (32 * i + 12 * o) for o, i in (m.shape for m in moe_modules(host)))
    assert patched.clone().get_nested_additional_models()[0].model is extra.model


@case
def a_dev_lora_on_fill_is_padded_and_a_fill_lora_on_dev_refused(host):
    lora = host.pack("models.lora")
    model, dev = tiny_flux(), tiny_flux(16)
    (A, B) = factors({"x_embedder": (HIDDEN, 64)})["x_embedder"]
    got, report = apply(host, model, weights_of(host, {"x_embedder": (A, B)}))
    wide = torch.nn.functional.pad(A, (0, 320))
    want = apply(host, model, weights_of(host, {"x_embedder": (wide, B)}))[0]
    assert change(predict(got), predict(want)) == 0 and "padded" in str(report)
    try:
        apply(host, dev, weights_of(host, {"x_embedder": (wide, B)}))
        raise AssertionError("a Fill LoRA was accepted by a dev model")
    except lora.LoraError as error:
        assert "FLUX Fill" in str(error)
    assert dev.patches == {}


@case
def a_bfl_control_lora_enlarges_the_first_layer_as_core_does(host):
    import comfy.lora
    import comfy.lora_convert

    read = host.pack("models.lora.read")
    files = host.pack("models.lora.files")
    model, pairs = (
        tiny_flux(16),
        factors({"img_in": (HIDDEN, 128), "single_blocks.0.linear2": (HIDDEN, 5 * HIDDEN)}),
    )
    sd = {f"{n}.lora_A.weight": a for n, (a, _) in pairs.items()}
    sd |= {f"{n}.lora_B.weight": b for n, (_, b) in pairs.items()}
    sd["single_blocks.0.linear2.lora_B.bias"] = torch.linspace(-1, 1, HIDDEN)
    sd["single_blocks.0.norm.key_norm.scale"] = torch.full((16,), 0.5)
    sd["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.full((16,), 2.0)
    converted = comfy.lora_convert.convert_lora(dict(sd))
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    theirs = model.clone()
    theirs.add_patches(comfy.lora.load_lora(converted, key_map), 1.0)
    raw = files.RawFile(host.base / "control.safetensors", sd, {})
    ours, report = apply(host, model, read.canonical(raw))
    got, want = (patched_weights(p) for p in (ours, theirs))
    assert set(got) == set(want) and got["diffusion_model.img_in.weight"].shape == (HIDDEN, 128)
    assert all(change(got[k], want[k]) < 1e-6 for k in got)
    assert not report.skipped


def patched_weights(patcher) -> dict[str, torch.Tensor]:
    import comfy.lora

    state = patcher.model.state_dict()
    return {k: comfy.lora.calculate_weight(p, state[k].clone(), k) for k, p in patcher.patches.items()}


@case
def lycoris_factors_equal_cores_own(host):
    import comfy.sd

    generator = torch.Generator().manual_seed(4)
    model, name = tiny_flux(), "single_transformer_blocks.0.proj_mlp"
    w1, w2 = torch.randn(16, 8, generator=generator), torch.randn(24, 12, generator=generator)
    core = {f"lycoris_{name.replace('.', '_')}.lokr_w1": w1, f"lycoris_{name.replace('.', '_')}.lokr_w2": w2}
    theirs, _ = comfy.sd.load_lora_for_models(model, None, core, 0.1, 0)
    lora = host.pack("models.lora")
    weights = lora.LoraWeights({name: lora.Factored("lokr", {"w1": w1, "w2": w2})})
    want = predict(theirs)
    assert change(predict(apply(host, model, weights, 0.1)[0]), want) < 1e-5
    assert change(predict(apply(host, model, weights, 0.1, window=(0.9, 0.1))[0]), want) < 1e-4


@case
def another_base_is_refused_and_the_model_untouched(host):
    lora, model = host.pack("models.lora"), tiny_flux()
    for name, shape, words in (
        ("transformer_blocks.0.attn.to_q", (3072, 3072), "3072 -> 3072, the model's is 96 -> 96"),
        ("down_blocks.0.attentions.0.proj_in", (8, 8), "none of its layers"),
    ):
        try:
            apply(host, model, weights_of(host, factors({name: shape})))
            raise AssertionError(f"{name} was accepted")
        except lora.LoraError as error:
            assert words in str(error), error
    assert model.patches == {}


def peft_folder(host, name: str, pairs, alpha: float):
    import folder_paths
    from safetensors.torch import save_file

    folder = host.base / "models" / "loras" / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{n}.lora_{ab}.weight": t
        for n, p in pairs.items()
        for ab, t in zip("AB", p, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
    folder_paths.filename_list_cache.pop("loras", None)
    return folder


@case
def the_node_lists_and_loads_a_peft_folder_at_its_trained_strength(host):
    node = host.nodes["DiptychGRPOLoraLoader"]
    pairs = factors(layers())
    folder = peft_folder(host, "grpo/checkpoint-7", pairs, alpha=8.0)
    names = node.INPUT_TYPES()["required"]["lora"][0]
    assert "grpo/checkpoint-7/" in [n.replace("\\", "/") for n in names]
    assert node.VALIDATE_INPUTS("grpo/checkpoint-7/") is True
    model = tiny_flux()
    with torch.inference_mode():
        patched, report, _ = node().load(model, "grpo/checkpoint-7/", 1.0)["result"]
    want = apply(host, model, weights_of(host, pairs, 2.0))[0]
    assert change(predict(patched), predict(want)) < 1e-6
    assert "adapter_config.json" in report and "step 7" in report
    key = node.IS_CHANGED(lora="grpo/checkpoint-7/")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    assert node.IS_CHANGED(lora="grpo/checkpoint-7/") != key
    assert "not in ComfyUI's loras folder" in node.VALIDATE_INPUTS("gone.safetensors")


@case
def the_node_uses_the_files_window_unless_told_otherwise(host):
    import folder_paths

    lora, node = host.pack("models.lora"), host.nodes["DiptychGRPOLoraLoader"]
    weights = weights_of(host, factors(layers()), base="FLUX Fill")
    lora.save(host.base / "models" / "loras" / "windowed.safetensors", weights, {"sigma_window": [1.0, 0.5]})
    folder_paths.filename_list_cache.pop("loras", None)
    model = tiny_flux()
    with torch.inference_mode():
        assert "1 >= sigma > 0.5" in node().load(model, "windowed.safetensors", 1.0)["result"][1]
        assert "sigma" not in node().load(model, "windowed.safetensors", 1.0, file_window=False)["result"][1]
        report = node().load(model, "windowed.safetensors", 1.0, sigma_start=0.8, sigma_end=0.2)["result"][1]
    assert "0.8 >= sigma > 0.2" in report


def tiny_unet():
    """A nine-channel Stable Diffusion 1.5 UNet as a ModelPatcher."""
    import comfy.model_patcher
    import comfy.supported_models

    config = dict(comfy.supported_models.SD15.unet_config) | {
        "image_size": 32,
        "in_channels": 9,
        "out_channels": 4,
        "model_channels": 32,
        "num_heads": 4,
        "num_head_channels": -1,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "adm_in_channels": None,
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
    }
    conf = comfy.supported_models.SD15(config)
    conf.set_inference_dtype(torch.float32, None)
    return comfy.model_patcher.ModelPatcher(conf.get_model({}, ""), torch.device("cpu"), torch.device("cpu"))


@case
def a_stable_diffusion_lora_of_ours_loads_here_and_in_core(host):
    """Core takes kohya names only for a UNet; every module must arrive in both."""
    import comfy.lora

    model = tiny_unet()
    lora = host.pack("models.lora")
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    shapes = {
        f"{block}attn1.to_q": (32, 32),
        f"{block}attn1.to_out.0": (32, 32),
        f"{block}attn2.to_k": (32, 32),
    }
    path = lora.save(
        host.base / "sd.safetensors", weights_of(host, factors(shapes), 0.5, base="Stable Diffusion UNet")
    )
    _, report = apply(host, model, lora.read(path))
    assert set(report.loaded) == set(shapes) and not report.skipped
    sd = comfy.utils.load_torch_file(str(path))
    core = comfy.lora.load_lora(sd, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert len(core) == len(shapes)


@case
def a_window_of_stable_diffusion_is_open_at_the_trained_timesteps(host):
    """Those that training visits in steps 2 and 3 of 10, whichever of core's schedulers passes them."""
    import comfy.samplers

    ddim, runtime = host.pack("samplers.ddim"), host.pack("models.lora.comfy")
    model = tiny_unet()
    sampling = model.get_model_object("model_sampling")
    timesteps = ddim.schedule(10).timesteps.tolist()
    window = ddim.noise_level(timesteps[2]), ddim.noise_level(timesteps[4])
    in_window = host.pack("models.lora.delta").in_window
    open_at = [
        t for t in timesteps if in_window(runtime._sigma(model.model, sampling.sigmas[t][None]), window)
    ]
    assert open_at == timesteps[2:4] == [701, 601], open_at
    steps = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", 10)[:-1]
    levels = [runtime._sigma(model.model, sigma[None]) for sigma in steps]
    assert [in_window(level, window) for level in levels] == [t in (701, 601) for t in timesteps], levels


@case
def a_compiled_model_is_refused_where_the_lora_works_at_run_time(host):
    """Before the loader and behind it, whole or in parts; a LoRA that is merged stays allowed."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    lora = host.pack("models.lora")
    weights = weights_of(host, factors(layers()))

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager")
        return model

    def in_parts(model):
        model, name = model.clone(), "diffusion_model.double_blocks.0"
        model.add_object_patch(name, torch.compile(model.get_model_object(name), backend="eager"))
        return model

    def refused(function):
        try:
            function()
        except lora.LoraError as error:
            return "leave out the compile node" in str(error)
        return False

    for compile_model in (compiled, in_parts):
        before = compile_model(tiny_flux())
        assert refused(lambda before=before: apply(host, before, weights, window=(1.0, 0.5)))
        assert not refused(lambda before=before: apply(host, before, weights))
        behind = compile_model(apply(host, tiny_flux(), weights, window=(1.0, 0.5))[0])
        assert refused(lambda behind=behind: predict(behind, 0.7)), compile_model.__name__


@case
def a_whole_sampling_run_switches_at_the_window(host):
    """Equal to sampling the first steps with the merged LoRA and the rest with the base."""
    import comfy.sample
    import comfy.samplers

    model = tiny_flux(16)
    lora_weights = weights_of(host, factors(layers(64)), 0.5)
    merged = apply(host, model, lora_weights)[0]
    windowed = apply(host, model, lora_weights, window=(1.0, 0.5))[0]
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(1, 5, 32, generator=generator)
    positive = [[text, {"pooled_output": torch.randn(1, 32, generator=generator), "guidance": 3.5}]]
    sampler = comfy.samplers.sampler_object("euler")
    steps = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    latent, noise = torch.zeros(1, 16, 8, 8), torch.randn(1, 16, 8, 8, generator=generator)

    def sample(patcher, sigmas, start, noise):
        with torch.inference_mode():
            return comfy.sample.sample_custom(patcher, noise, 1.0, sampler, sigmas, positive, positive, start)

    got = sample(windowed, steps, latent, noise)
    # 1.0 and 0.8 lie in the window, 0.5 is its open end; a split run carries x on as its new latent
    first = sample(merged, steps[:3], latent, noise)
    want = sample(model, steps[2:], first, torch.zeros_like(noise))
    assert change(got, sample(merged, steps, latent, noise)) > 1e-3
    assert change(got, want) < host.within(1e-4), change(got, want)


@case
def fp8_models_take_plain_loras_as_core_does_and_experts_beside_them(host):
    import comfy.sd

    model, pairs = tiny_flux(storage=torch.float8_e4m3fn), factors(layers())
    core = {
        f"transformer.{n}.lora_{ab}.weight": t
        for n, p in pairs.items()
        for ab, t in zip("AB", p, strict=True)
    }
    theirs, _ = comfy.sd.load_lora_for_models(model, None, core, 1.0, 0)
    base, want = predict(model), predict(theirs)
    ours = apply(host, model, weights_of(host, pairs))[0]
    got = predict(ours)
    assert change(got, want) == 0 and change(got, base) > 1e-2
    both = predict(apply(host, ours, experts_of(host))[0])
    assert both.isfinite().all() and change(both, got) > 1e-3
    assert change(predict(apply(host, model, weights_of(host, pairs), window=(0.9, 0.4))[0]), base) > 1e-2
