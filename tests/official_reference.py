"""Test helper: a plain, independent implementation of the computations that the published format describes.

It reads official tensors by official names, sample by sample and head by head, and shares no code with the package.
"""

import torch
import torch.nn.functional as F


def plain_norm(x):
    """Layer norm without scale and shift."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def affine(tensors, name, x):
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def attention(query, key, value, head_dim, scale, is_visible=None):
    """Attention of (L, D) to (S, D), one head at a time; the mask `is_visible` is (L, S)."""
    outputs = []
    for start in range(0, query.shape[1], head_dim):
        part = slice(start, start + head_dim)
        logits = scale * query[:, part] @ key[:, part].T
        if is_visible is not None:
            logits = logits.masked_fill(~is_visible, float("-inf"))
        outputs.append(logits.softmax(-1) @ value[:, part])
    return torch.cat(outputs, dim=1)


def per_head(function, x, head_dim):
    return torch.cat([function(part) for part in x.split(head_dim, dim=1)], dim=1)


def tokenizer_block(tensors, block, x, head_dim, is_visible=None, modulation=None):
    """One block on (L, D); `modulation` holds six (L, D): gates, then shift and scale of attention and of the MLP."""
    gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = modulation or (1, 1, 0, 0, 0, 0)
    h = plain_norm(x) * (1 + scale_a) + shift_a
    query, key = (per_head(plain_norm, affine(tensors, f"{block}attn.{n}", h), head_dim) for n in ("wq", "wk"))
    mixed = attention(query, key, affine(tensors, f"{block}attn.wv", h), head_dim, 8 / head_dim, is_visible)
    x = x + gate_a * affine(tensors, f"{block}attn.proj", mixed)
    h = plain_norm(x) * (1 + scale_m) + shift_m
    h = F.silu(affine(tensors, f"{block}mlp.fc1", h)) * affine(tensors, f"{block}mlp.fc3", h)
    return x + gate_m * affine(tensors, f"{block}mlp.fc2", h)


def patch_tokens(tensors, embedder, positions, latents, patch):
    """Patch tokens of one image (C, h, w), row by row: (N, D)."""
    tokens = []
    for row in range(latents.shape[1] // patch):
        for column in range(latents.shape[2] // patch):
            cut = latents[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            token = affine(tensors, f"{embedder}.patch_proj", cut.permute(1, 2, 0).reshape(1, -1))[0]
            tokens.append(token + tensors[f"{positions}.posembs"][0, :, row, column])
    return torch.stack(tokens)


def features(tensors, shape, latents):
    """Features of one image (C, h, w): (K, Q)."""
    prefix = "encoder.module_dict."
    patches = patch_tokens(tensors, f"{prefix}enc_patch_emb", f"{prefix}enc_posemb_module", latents, shape["patch"])
    n = len(patches)
    x, is_visible = patches, None
    if shape["registers"]:
        x = torch.cat([patches, tensors[f"{prefix}enc_register_module.registers"]])
        is_visible = torch.zeros(len(x), len(x), dtype=torch.bool)
        is_visible[:, :n] = True
        for register in range(n, len(x)):
            is_visible[register, n : register + 1] = True
    for index in range(shape["encoder_depth"]):
        block = f"{prefix}enc_transformer.blocks.{index}."
        x = tokenizer_block(tensors, block, x, shape["encoder_head_dim"], is_visible)
    return affine(tensors, f"{prefix}enc_to_latents.proj", plain_norm(x[n:] if shape["registers"] else x))


def token_ids(shape, values):
    """Token ids of features (K, Q): (K,)."""
    ids, place = torch.zeros(len(values), dtype=torch.int64), 1
    for dimension, levels in enumerate(shape["levels"]):
        half, offset = (levels - 1) * 1.001 / 2, 0.5 if levels % 2 == 0 else 0.0
        shift = torch.atanh(torch.tensor(offset / half))
        rounded = ((values[:, dimension] + shift).tanh() * half - offset).round().long()
        ids += (rounded + levels // 2) * place
        place *= levels
    return ids


def codes(shape, ids):
    """Codes of token ids (K,): (K, Q)."""
    columns = []
    for levels in shape["levels"]:
        columns.append((ids % levels - levels // 2) / (levels // 2))
        ids = ids // levels
    return torch.stack(columns, dim=-1)


def velocity(tensors, shape, latents, t, ids, is_unconditional=False):
    """Velocity of one noisy image (C, h, w) at noise level `t`, for token ids (k,)."""
    prefix, patch = "decoder.module_dict.", shape["patch"]
    patches = patch_tokens(
        tensors, f"{prefix}dec_noise_patch_emb", f"{prefix}dec_patches_posemb_module", latents, patch
    )
    n, width, kept = len(patches), shape["decoder_width"], len(ids)
    length = shape["registers"] or n
    ids = torch.cat([ids, torch.zeros(length - kept, dtype=torch.int64)])
    tokens = affine(tensors, f"{prefix}dec_from_latents.proj", codes(shape, ids))
    if shape["registers"]:
        tokens = tokens + tensors[f"{prefix}dec_registers_posemb_module.posembs"][0, 0].T
    if shape["nested_dropout"]:
        tokens[kept:] = tensors[f"{prefix}dec_nested_dropout.dropout_mask_token"]
    if is_unconditional:
        tokens[:] = tensors[f"{prefix}dec_latent_dropout.nullcond"]

    half = shape["frequencies"] // 2
    frequencies = 1000 / shape["max_timestep"] * 256 ** (-torch.arange(half) / half)
    waves = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])[None]
    c = affine(tensors, f"{prefix}dec_time_embedder.mlp.0", waves)
    c = F.silu(affine(tensors, f"{prefix}dec_time_embedder.mlp.2", F.silu(c)))
    x = torch.cat([patches, tokens]) if shape["registers"] else patches + tokens
    for index in range(shape["decoder_depth"]):
        block = f"{prefix}dec_transformer.blocks.{index}."
        modulation = affine(tensors, f"{block}adaLN_modulation.1", c)[0].view(-1, 6, width)
        rows = [modulation[0]] * n + [modulation[-1]] * (len(x) - n)
        x = tokenizer_block(tensors, block, x, shape["decoder_head_dim"], None, torch.stack(rows).unbind(1))
    shift, scale = affine(tensors, f"{prefix}dec_to_patches.adaLN_modulation.1", c)[0].view(2, width)
    cells = affine(tensors, f"{prefix}dec_to_patches.proj", plain_norm(x[:n]) * (1 + scale) + shift)
    result, columns = torch.empty_like(latents), latents.shape[2] // patch
    for number, cell in enumerate(cells):
        row, column = patch * (number // columns), patch * (number % columns)
        result[:, row : row + patch, column : column + patch] = cell.view(patch, patch, -1).permute(2, 0, 1)
    return result


def gained_norm(tensors, name, x, kind, eps):
    if kind.endswith("RMSNorm"):
        return tensors[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def prior_attention(tensors, name, query, key, value, head_dim, scale, norm, is_visible):
    if norm:
        query = per_head(
            lambda x: gained_norm(tensors, f"{name}.q_norm", x, norm["_target_"], norm["eps"]), query, head_dim
        )
        key = per_head(
            lambda x: gained_norm(tensors, f"{name}.k_norm", x, norm["_target_"], norm["eps"]), key, head_dim
        )
    return attention(query, key, value, head_dim, scale, is_visible)


def prior_logits(tensors, shape, ids, text=None, label=None, activation=lambda x: F.gelu(x, approximate="tanh")):
    """Logits (k + 1, V) of what follows the start and each of `ids` (k,), for text states (M, C) or a class."""
    image_model, width = "models.ar_image_model.", shape["width"]
    preprocessor = f"{image_model}preprocessor."
    x = torch.cat([tensors[f"{preprocessor}sos_token_embed"][0], tensors[f"{preprocessor}embedding.weight"][ids]])
    x = x + tensors[f"{preprocessor}positional_embedding"][: len(x)]
    if label is not None and label >= 0:
        x[0] += tensors[f"{preprocessor}cls_embedding.weight"][label]
    if text is not None:
        text = activation(affine(tensors, "models.text_encoder.mlp.fc1", text))
        text = affine(tensors, "models.text_encoder.mlp.fc2", text)
    head_dim, kind, eps = width // shape["heads"], shape["norm"], shape["eps"]
    causal = torch.ones(len(x), len(x)).tril().bool()
    for index in range(shape["depth"]):
        block = f"{image_model}trunk.blocks.{index}."
        name = f"{block}{'attn' if text is None else 'self_attn'}"
        h = gained_norm(tensors, f"{block}norm_1", x, kind, eps)
        if f"{name}.qkv.weight" in tensors:
            query, key, value = affine(tensors, f"{name}.qkv", h).split(width, dim=1)
        else:
            query, key, value = (affine(tensors, f"{name}.{one}_proj", h) for one in "qkv")
        scale = shape["qk_scale"] or head_dim**-0.5
        mixed = prior_attention(tensors, name, query, key, value, head_dim, scale, shape["qk_norm"], causal)
        out = f"{name}.proj" if f"{name}.proj.weight" in tensors else f"{name}.o_proj"
        x = x + affine(tensors, out, mixed)
        if text is not None:
            name, h = f"{block}cross_attn", gained_norm(tensors, f"{block}norm_2", x, kind, eps)
            query, key, value = (
                affine(tensors, f"{name}.{one}", y) for one, y in (("Wq", h), ("Wk", text), ("Wv", text))
            )
            norm = shape["cross_qk_norm"]
            mixed = prior_attention(tensors, name, query, key, value, head_dim, head_dim**-0.5, norm, None)
            x = x + affine(tensors, f"{name}.proj", mixed)
        h = gained_norm(tensors, f"{block}norm_{2 if text is None else 3}", x, kind, eps)
        h = F.silu(affine(tensors, f"{block}mlp.fc1", h)) * affine(tensors, f"{block}mlp.fc3", h)
        x = x + affine(tensors, f"{block}mlp.fc2", h)
    if shape["final_norm"]:
        x = gained_norm(tensors, f"{image_model}trunk.post_trunk_norm", x, kind, eps)
    if shape["head_norm"]:
        x = gained_norm(tensors, f"{image_model}head.norm", x, "LayerNorm", 1e-6)
    return affine(tensors, f"{image_model}head.linear", x)
