"""Pieces of a training step in other forms, timed at the recipe's shapes. For one look; not kept."""

import time

import torch
import torch.nn.functional as F

from smope.networks.attention3d import MeshAttention
from smope.networks.mesh_encoder import MeshTokens
from smope.networks.refine import read_maps
from smope.ops import ms_deform_attn
from smope.train.matcher import assign

D = "cuda"
B, P, M, L = 96, 16, 8, 4


def timed(name, f, n=10):
    try:
        for _ in range(3):
            f()
        torch.cuda.synchronize()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(n):
            f()
        b.record()
        torch.cuda.synchronize()
        print(f"{name}: {a.elapsed_time(b) / n:.3f} ms", flush=True)
    except Exception as e:
        print(f"{name}: FAILED {type(e).__name__} {str(e)[:1500]}", flush=True)


def read_by_kernel(maps, points):
    b, p, a, _ = points.shape
    out = []
    for m in maps:
        c, h, w = m.shape[1:]
        value = m.permute(0, 2, 3, 1).flatten(1, 2)[:, :, None]
        ref = points.flatten(1, 2)[:, :, None]
        off = torch.zeros(b, p * a, 1, 1, 1, 2, device=m.device, dtype=m.dtype)
        log = torch.zeros(b, p * a, 1, 1, 1, device=m.device, dtype=m.dtype)
        out.append(ms_deform_attn(value, ((h, w),), ref, off, log))
    return torch.cat(out, -1).unflatten(1, (p, a))


def maps_(kind):
    shapes = ((128, 60, 80), (64, 30, 40), (64, 120, 160))
    return [
        torch.randn(B, *s, device=D).to(kind).to(memory_format=torch.channels_last).requires_grad_()
        for s in shapes
    ]


for kind in (torch.bfloat16, torch.float32):
    maps = maps_(kind)
    for a in (256, 64):
        # points close together, as cells of a square and anchors of an object are
        centre = torch.rand(B, P, 1, 2, device=D) * 0.8 + 0.1
        pts = centre + 0.1 * (torch.rand(B, P, a, 2, device=D) - 0.5)
        if kind == torch.float32 and a == 256:
            x, y = read_maps(tuple(maps), pts), read_by_kernel(maps, pts)
            print("difference", (x - y).abs().max().item(), x.abs().max().item())
        for name, f in (("grid_sample", read_maps), ("kernel", read_by_kernel)):
            timed(f"read {name} {kind} {a} forward", lambda: f(maps, pts).detach())
            g = torch.randn(B, P, a, 256, device=D).to(kind)
            timed(
                f"read {name} {kind} {a} forward + backward",
                lambda: torch.autograd.grad((r := f(maps, pts)), maps, g.to(r.dtype)),
            )

att = MeshAttention(256).to(D)
q = torch.randn(L * B, 32, 256, device=D, requires_grad=True)
labels = torch.randint(0, M, (L * B, 32), device=D)
tokens = MeshTokens(
    torch.randn(M, 256, device=D, requires_grad=True),
    torch.randn(M, 32, 256, device=D, requires_grad=True),
    torch.rand(M, device=D),
    torch.randn(M, 64, 9, device=D),
)


def dense(self, queries, labels, meshes):
    chosen = F.one_hot(labels, len(meshes)).to(queries.dtype)
    x = self.norm(queries + chosen @ self.embedding(meshes.embedding))
    key, value = (
        self.key_value(meshes.local).flatten(0, 1).unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
    )
    query = (
        self.query(x).flatten(0, 1).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
    )  # [1, H, B P, D]
    own = labels.flatten()[:, None] == torch.arange(len(meshes), device=labels.device).repeat_interleave(
        meshes.local.shape[1]
    )
    attended = F.scaled_dot_product_attention(query, key[None], value[None], attn_mask=own)
    attended = attended[0].transpose(0, 1).flatten(1).unflatten(0, queries.shape[:2])
    return self.feed_forward(self.output_norm(x + self.output(attended)))


leaves = [q, tokens.embedding, tokens.local, *att.parameters()]


def run(f):
    with torch.autocast("cuda", torch.bfloat16):
        out = f(q, labels, tokens)
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


with torch.autocast("cuda", torch.bfloat16):
    print("attention difference", (att(q, labels, tokens) - dense(att, q, labels, tokens)).abs().max().item())
timed("mesh attention now, both ways", lambda: run(att))
timed("mesh attention dense, both ways", lambda: run(lambda *a: dense(att, *a)))
c1 = torch.compile(lambda *a: att(*a), dynamic=False)
timed("mesh attention now, compiled, both ways", lambda: run(c1))
c2 = torch.compile(lambda *a: dense(att, *a), dynamic=False)
timed("mesh attention dense, compiled, both ways", lambda: run(c2))

table = torch.randn(5, B, 100, 8, device=D)
table[:, :, :, 5:] = 0
began = time.perf_counter()
cpu = assign(table.cpu())
print(f"assignment on the host: {(time.perf_counter() - began) * 1e3:.2f} ms")
try:
    from smope.train.assign_triton import assign_on_device

    gpu = assign_on_device(table).cpu()
    total = lambda m: table.cpu().double().gather(2, m[:, :, None, :]).sum((2, 3))  # noqa: E731
    print("assignment: largest excess of cost", (total(gpu) - total(cpu)).abs().max().item())
    timed("assignment on the device", lambda: assign_on_device(table))
except Exception as e:
    print("assignment FAILED", type(e).__name__, str(e)[:3000])

print(
    "depthwise convolutions, bf16 channels last, batch 96: forward; input and weight gradients; floor by bytes at 4 TB/s"
)
for c, k, h, w, s in (
    (144, 5, 120, 160, 2),
    (288, 5, 60, 80, 1),
    (288, 3, 60, 80, 2),
    (528, 3, 30, 40, 1),
    (528, 5, 30, 40, 1),
    (720, 5, 30, 40, 1),
    (720, 5, 30, 40, 2),
    (1248, 5, 15, 20, 1),
    (1248, 3, 15, 20, 1),
):
    x = (
        torch.randn(B, c, h, w, device=D, dtype=torch.bfloat16)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
    )
    wt = torch.randn(c, 1, k, k, device=D, dtype=torch.bfloat16, requires_grad=True)
    y = F.conv2d(x, wt, None, s, k // 2, 1, c)
    g = torch.randn_like(y)
    floor = 2 * (x.numel() + y.numel()) / 4e9
    print(f"-- {c} channels {k}x{k} stride {s} of {h}x{w}: floor {floor:.3f} ms")
    timed("   forward", lambda: F.conv2d(x, wt, None, s, k // 2, 1, c).detach())
    timed("   input gradient", lambda: torch.autograd.grad(F.conv2d(x, wt, None, s, k // 2, 1, c), x, g))
    timed("   weight gradient", lambda: torch.autograd.grad(F.conv2d(x, wt, None, s, k // 2, 1, c), wt, g))
