"""Triton kernels of latent attention: a few queries read a long prefix and a short tail, which are never joined.

latent.py holds the definition in PyTorch and the autograd functions around these three:

    attention_forward    s = scaling · q kᵀ,   lse = log Σ exp(s),   p = exp(s - lse),   output = p v
    query_backward       delta = Σ output · d_output,   ds = p · (d_output vᵀ - delta),   d_q = scaling · ds k
    key_backward         d_k = scaling · dsᵀ q,   d_v = pᵀ d_output,   over the queries of several steps at once

so each step reads the prefix once on the way forth and once on the way back, and its gradient is written once. Queries
are too few to fill a GPU: the prefix is cut into splits, each of which leaves its own output and lse, and a second
kernel weighs them. The tail is one split more. The query heads that share a kv head stand in one block of rows, so
keys and values are read once for all of them. All sums are in float32 and in a fixed order.

Shapes: B batch, H heads of the queries, H' of keys and values (H = G · H'), Q queries of one step, N of all steps,
P prefix, T tail, S splits of the prefix, K head dim.

Source: FlashAttention-2, https://arxiv.org/abs/2307.08691; splits as in https://pytorch.org/blog/flash-decoding/.
"""

from typing import NamedTuple

import torch


try:
    import triton
    import triton.language as tl
except ImportError:  # not a requirement: the PyTorch definition serves where it is missing
    triton = None


# Programs that fill a large GPU, two on each of its processors. A constant, so that results do not depend on the card.
FULL_GRID = 256
MAX_SPLITS = 63  # and the tail: the second kernel holds all of them at once
MAX_HEAD_DIM = 256
OLDEST_TRITON = (3, 3)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# In the kernels: i_ index of a program, o_ offsets, m_ masks, p_ pointer, s_ strides, b_ block of numbers. A row is
# one query of one query head. Lengths are not specialised: a tail that grows would compile its kernels repeatedly.
if triton is not None:

    @triton.jit
    def _rows(i_block, i_kv_head, groups, num_queries, ROWS: tl.constexpr):
        """Return head and query of each row in block `i_block` of a kv head, and which rows exist."""
        o_row = i_block * ROWS + tl.arange(0, ROWS)
        return i_kv_head * groups + o_row // num_queries, o_row % num_queries, o_row < groups * num_queries

    @triton.jit
    def _pointers(p_tensor, s_tensor, i_batch, o_head, o_position, DIMS: tl.constexpr):
        """To (positions, DIMS) of a (B, heads, positions, K) tensor; in 64 bits, as all of it may pass 2³¹."""
        o_first = i_batch.to(tl.int64) * s_tensor[0] + o_head.to(tl.int64) * s_tensor[1]
        o_first += o_position.to(tl.int64) * s_tensor[2]
        return p_tensor + o_first[:, None] + tl.arange(0, DIMS)[None, :] * s_tensor[3]

    @triton.jit
    def _load(p_tensor, s_tensor, i_batch, o_head, o_position, m_position, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr):
        m_tile = m_position[:, None] & (tl.arange(0, DIMS) < HEAD_DIM)[None, :]
        return tl.load(_pointers(p_tensor, s_tensor, i_batch, o_head, o_position, DIMS), mask=m_tile, other=0.0)

    @triton.jit
    def _store(
        b_tile, p_tensor, s_tensor, i_batch, o_head, o_position, m_position, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr
    ):
        m_tile = m_position[:, None] & (tl.arange(0, DIMS) < HEAD_DIM)[None, :]
        p_tile = _pointers(p_tensor, s_tensor, i_batch, o_head, o_position, DIMS)
        tl.store(p_tile, b_tile.to(p_tensor.dtype.element_ty), mask=m_tile)

    @triton.jit
    def _row_pointers(p_tensor, s_tensor, i_batch, o_head, o_query):
        """Return pointers to one number per row of a (B, H, queries) tensor."""
        o_row = i_batch.to(tl.int64) * s_tensor[0] + o_head.to(tl.int64) * s_tensor[1]
        return p_tensor + o_row + o_query.to(tl.int64) * s_tensor[2]

    @triton.jit
    def _visible(p_mask, s_mask, i_batch, o_query, o_key, m_pair):
        """Return which pairs of a query and a key exist and may see each other."""
        if p_mask is not None:
            o_pair = i_batch.to(tl.int64) * s_mask[0] + o_query.to(tl.int64) * s_mask[2]
            m_pair = m_pair & (tl.load(p_mask + o_pair + o_key.to(tl.int64) * s_mask[3], mask=m_pair, other=0) != 0)
        return m_pair

    @triton.jit
    def _scores(
        b_query, p_key, s_key, p_value, s_value, p_mask, s_mask, i_batch, i_kv_head, o_query, m_row,
        start, last, first_column, scaling, HEAD_DIM: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """The block of keys from `start` on, its values, scores (ROWS, KEYS), and which of them count."""
        o_key = start + tl.arange(0, KEYS)
        m_key = o_key < last
        b_key = _load(p_key, s_key, i_batch, i_kv_head, o_key, m_key, HEAD_DIM, DIMS)
        b_value = _load(p_value, s_value, i_batch, i_kv_head, o_key, m_key, HEAD_DIM, DIMS)
        m_pair = m_row[:, None] & m_key[None, :]
        m_pair = _visible(p_mask, s_mask, i_batch, o_query[:, None], (o_key + first_column)[None, :], m_pair)
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scaling  # (ROWS, KEYS)
        return b_key, b_value, b_score, m_pair

    @triton.jit
    def _attend(
        b_query, p_key, s_key, p_value, s_value, p_mask, s_mask, i_batch, i_kv_head, o_query, m_row,
        first, last, first_column, scaling,
        HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Attention of rows to keys `first` up to `last`: (ROWS, DIMS) and its lse (ROWS); 0 and -inf of nothing."""
        b_max = tl.full((ROWS,), -3.0e38, tl.float32)  # finite, as -inf - -inf would be NaN
        b_sum = tl.full((ROWS,), 0.0, tl.float32)
        b_output = tl.full((ROWS, DIMS), 0.0, tl.float32)
        for start in range(first, last, KEYS):
            _, b_value, b_score, m_pair = _scores(
                b_query, p_key, s_key, p_value, s_value, p_mask, s_mask, i_batch, i_kv_head, o_query, m_row,
                start, last, first_column, scaling, HEAD_DIM, KEYS, DIMS,
            )  # fmt: skip
            b_score = tl.where(m_pair, b_score, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
            b_weight = tl.exp(b_score - b_new_max[:, None])
            b_decay = tl.exp(b_max - b_new_max)
            b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
            b_seen = tl.dot(b_weight.to(b_value.dtype), b_value, input_precision="ieee")
            b_output = b_output * b_decay[:, None] + b_seen
            b_max = b_new_max
        b_divisor = tl.where(b_sum > 0, b_sum, 1.0)
        b_lse = tl.where(b_sum > 0, b_max + tl.log(b_divisor), float("-inf"))
        return b_output / b_divisor[:, None], b_lse

    @triton.jit(do_not_specialize=["num_queries", "prefix_length", "tail_length", "split_length"])
    def _forward_kernel(
        p_query, s_query, p_prefix_key, s_prefix_key, p_prefix_value, s_prefix_value,
        p_tail_key, s_tail_key, p_tail_value, s_tail_value, p_mask, s_mask,
        p_part, s_part, p_part_lse, s_part_lse,
        num_kv_heads, groups, num_queries, prefix_length, tail_length, split_length, scaling,
        HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Program (batch · kv head, split, block of rows): its part of the output and its lse."""
        i_batch, i_kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
        i_split = tl.program_id(1)
        o_head, o_query, m_row = _rows(tl.program_id(2), i_kv_head, groups, num_queries, ROWS)
        b_query = _load(p_query, s_query, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)
        if i_split == tl.num_programs(1) - 1:
            b_part, b_lse = _attend(
                b_query, p_tail_key, s_tail_key, p_tail_value, s_tail_value, p_mask, s_mask,
                i_batch, i_kv_head, o_query, m_row, 0, tail_length, prefix_length, scaling,
                HEAD_DIM, ROWS, KEYS, DIMS,
            )  # fmt: skip
        else:
            first = i_split * split_length
            last = tl.minimum(first + split_length, prefix_length)
            b_part, b_lse = _attend(
                b_query, p_prefix_key, s_prefix_key, p_prefix_value, s_prefix_value, p_mask, s_mask,
                i_batch, i_kv_head, o_query, m_row, first, last, 0, scaling,
                HEAD_DIM, ROWS, KEYS, DIMS,
            )  # fmt: skip
        _store(b_part, p_part + i_split * HEAD_DIM, s_part, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)
        p_lse = _row_pointers(p_part_lse + i_split, s_part_lse, i_batch, o_head, o_query)
        tl.store(p_lse, b_lse, mask=m_row)

    @triton.jit(do_not_specialize=["num_parts"])
    def _merge_kernel(
        p_part, p_part_lse, p_output, p_lse, num_parts,
        HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Program (row): its parts, each by its share exp(lse of the part - lse of all)."""
        i_row = tl.program_id(0).to(tl.int64)
        o_part, o_dim = tl.arange(0, PARTS), tl.arange(0, DIMS)
        m_part = o_part < num_parts
        b_part_lse = tl.load(p_part_lse + i_row * num_parts + o_part, mask=m_part, other=float("-inf"))
        m_part = m_part & (b_part_lse > float("-inf"))
        b_max = tl.maximum(tl.max(b_part_lse, 0), -3.0e38)
        b_share = tl.exp(b_part_lse - b_max)
        b_sum = tl.sum(b_share, 0)
        b_divisor = tl.where(b_sum > 0, b_sum, 1.0)
        o_tile = (i_row * num_parts + o_part)[:, None] * HEAD_DIM + o_dim[None, :]
        b_part = tl.load(p_part + o_tile, mask=m_part[:, None] & (o_dim < HEAD_DIM)[None, :], other=0.0)
        b_output = tl.sum(b_part * (b_share / b_divisor)[:, None], 0)
        tl.store(p_output + i_row * HEAD_DIM + o_dim, b_output.to(p_output.dtype.element_ty), mask=o_dim < HEAD_DIM)
        tl.store(p_lse + i_row, tl.where(b_sum > 0, b_max + tl.log(b_divisor), float("-inf")))

    @triton.jit
    def _query_gradient(
        b_query, b_grad_output, b_lse, b_delta, p_key, s_key, p_value, s_value, p_mask, s_mask,
        i_batch, i_kv_head, o_query, m_row, first, last, first_column, scaling,
        HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Gradient (ROWS, DIMS) of the queries through keys `first` up to `last`."""
        b_gradient = tl.full((ROWS, DIMS), 0.0, tl.float32)
        for start in range(first, last, KEYS):
            b_key, b_value, b_score, m_pair = _scores(
                b_query, p_key, s_key, p_value, s_value, p_mask, s_mask, i_batch, i_kv_head, o_query, m_row,
                start, last, first_column, scaling, HEAD_DIM, KEYS, DIMS,
            )  # fmt: skip
            b_weight = tl.exp(tl.where(m_pair, b_score - b_lse[:, None], float("-inf")))
            b_grad_weight = tl.dot(b_grad_output, tl.trans(b_value), input_precision="ieee")
            b_grad_score = b_weight * (b_grad_weight - b_delta[:, None])
            b_gradient += tl.dot(b_grad_score.to(b_key.dtype), b_key, input_precision="ieee")
        return b_gradient * scaling

    @triton.jit(do_not_specialize=["num_queries", "prefix_length", "tail_length", "split_length"])
    def _query_gradient_kernel(
        p_grad_output, s_grad_output, p_query, s_query,
        p_prefix_key, s_prefix_key, p_prefix_value, s_prefix_value,
        p_tail_key, s_tail_key, p_tail_value, s_tail_value, p_mask, s_mask,
        p_output, s_output, p_lse, s_lse, p_delta, s_delta, p_part, s_part,
        num_kv_heads, groups, num_queries, prefix_length, tail_length, split_length, scaling,
        HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Program (batch · kv head, split, block of rows): its part of the queries' gradient; of the tail, delta."""
        i_batch, i_kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
        i_split = tl.program_id(1)
        o_head, o_query, m_row = _rows(tl.program_id(2), i_kv_head, groups, num_queries, ROWS)
        b_query = _load(p_query, s_query, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)
        b_grad_output = _load(p_grad_output, s_grad_output, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)
        b_output = _load(p_output, s_output, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)
        b_delta = tl.sum(b_grad_output.to(tl.float32) * b_output.to(tl.float32), 1)
        b_lse = tl.load(_row_pointers(p_lse, s_lse, i_batch, o_head, o_query), mask=m_row, other=0.0)
        if i_split == tl.num_programs(1) - 1:
            tl.store(_row_pointers(p_delta, s_delta, i_batch, o_head, o_query), b_delta, mask=m_row)
            b_part = _query_gradient(
                b_query, b_grad_output, b_lse, b_delta, p_tail_key, s_tail_key, p_tail_value, s_tail_value,
                p_mask, s_mask, i_batch, i_kv_head, o_query, m_row, 0, tail_length, prefix_length, scaling,
                HEAD_DIM, ROWS, KEYS, DIMS,
            )  # fmt: skip
        else:
            first = i_split * split_length
            last = tl.minimum(first + split_length, prefix_length)
            b_part = _query_gradient(
                b_query, b_grad_output, b_lse, b_delta, p_prefix_key, s_prefix_key, p_prefix_value, s_prefix_value,
                p_mask, s_mask, i_batch, i_kv_head, o_query, m_row, first, last, 0, scaling,
                HEAD_DIM, ROWS, KEYS, DIMS,
            )  # fmt: skip
        _store(b_part, p_part + i_split * HEAD_DIM, s_part, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)

    @triton.jit(do_not_specialize=["num_parts"])
    def _sum_kernel(p_part, p_sum, num_parts, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, DIMS: tl.constexpr):
        """Program (row): the sum of its parts."""
        i_row = tl.program_id(0).to(tl.int64)
        o_part, o_dim = tl.arange(0, PARTS), tl.arange(0, DIMS)
        o_tile = (i_row * num_parts + o_part)[:, None] * HEAD_DIM + o_dim[None, :]
        m_tile = (o_part < num_parts)[:, None] & (o_dim < HEAD_DIM)[None, :]
        b_sum = tl.sum(tl.load(p_part + o_tile, mask=m_tile, other=0.0), 0)
        tl.store(p_sum + i_row * HEAD_DIM + o_dim, b_sum.to(p_sum.dtype.element_ty), mask=o_dim < HEAD_DIM)

    @triton.jit(do_not_specialize=["num_queries", "length"])
    def _key_gradient_kernel(
        p_grad_output, s_grad_output, p_query, s_query, p_key, s_key, p_value, s_value, p_mask, s_mask,
        p_lse, s_lse, p_delta, s_delta, p_grad_key, s_grad_key, p_grad_value, s_grad_value,
        num_kv_heads, groups, num_queries, length, scaling,
        HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIMS: tl.constexpr,
    ):  # fmt: skip
        """Program (batch · kv head, block of keys): gradients of these keys and values, over all rows in turn."""
        i_batch, i_kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
        o_key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        m_key = o_key < length
        b_key = _load(p_key, s_key, i_batch, i_kv_head, o_key, m_key, HEAD_DIM, DIMS)
        b_value = _load(p_value, s_value, i_batch, i_kv_head, o_key, m_key, HEAD_DIM, DIMS)
        b_grad_key = tl.full((KEYS, DIMS), 0.0, tl.float32)
        b_grad_value = tl.full((KEYS, DIMS), 0.0, tl.float32)
        for i_block in range(0, tl.cdiv(groups * num_queries, ROWS)):
            o_head, o_query, m_row = _rows(i_block, i_kv_head, groups, num_queries, ROWS)
            b_query = _load(p_query, s_query, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)
            b_grad_output = _load(p_grad_output, s_grad_output, i_batch, o_head, o_query, m_row, HEAD_DIM, DIMS)
            b_lse = tl.load(_row_pointers(p_lse, s_lse, i_batch, o_head, o_query), mask=m_row, other=0.0)
            b_delta = tl.load(_row_pointers(p_delta, s_delta, i_batch, o_head, o_query), mask=m_row, other=0.0)
            m_pair = m_key[:, None] & m_row[None, :]
            m_pair = _visible(p_mask, s_mask, i_batch, o_query[None, :], o_key[:, None], m_pair)
            b_score = tl.dot(b_key, tl.trans(b_query), input_precision="ieee") * scaling  # (KEYS, ROWS)
            b_weight = tl.exp(tl.where(m_pair, b_score - b_lse[None, :], float("-inf")))
            b_grad_value += tl.dot(b_weight.to(b_query.dtype), b_grad_output, input_precision="ieee")
            b_grad_weight = tl.dot(b_value, tl.trans(b_grad_output), input_precision="ieee")
            b_grad_score = b_weight * (b_grad_weight - b_delta[None, :])
            b_grad_key += tl.dot(b_grad_score.to(b_query.dtype), b_query, input_precision="ieee")
        b_grad_key *= scaling
        _store(b_grad_key, p_grad_key, s_grad_key, i_batch, i_kv_head, o_key, m_key, HEAD_DIM, DIMS)
        _store(b_grad_value, p_grad_value, s_grad_value, i_batch, i_kv_head, o_key, m_key, HEAD_DIM, DIMS)


class Plan(NamedTuple):
    """The partition of one call: `blocks` are the kernels' constants, `sizes` their other arguments."""

    blocks: dict
    grid: tuple[int, int, int]
    sizes: tuple[int, ...]
    num_splits: int
    split_length: int


def blocks_of(query: torch.Tensor, num_rows: int, *, bytes_of_keys: int) -> dict:
    """Return the kernels' constants for `num_rows` rows a kv head; blocks are powers of two, at least tl.dot's 16."""
    head_dim = query.shape[-1]
    dims = max(16, triton.next_power_of_2(head_dim))
    row_bytes = dims * query.element_size()
    # Chosen so that the compiler spills nearly no registers and shared memory stays under 100 kB; not tuned on a GPU.
    return {
        "HEAD_DIM": head_dim,
        "DIMS": dims,
        "ROWS": max(16, min(32, triton.next_power_of_2(num_rows), 8192 // row_bytes)),
        "KEYS": max(16, min(64, bytes_of_keys // row_bytes)),
        "num_warps": 8 if query.element_size() > 2 else 4,
        "num_stages": 2,
    }


def plan_of(query: torch.Tensor, prefix_key: torch.Tensor, tail_length: int = 0) -> Plan:
    """Return splits of whole blocks of keys, as many as fill the grid, none of them empty."""
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, prefix_length = prefix_key.shape[1:3]
    groups = num_heads // num_kv_heads
    blocks = blocks_of(query, groups * num_queries, bytes_of_keys=16384)
    row_blocks = triton.cdiv(groups * num_queries, blocks["ROWS"])
    key_blocks = triton.cdiv(prefix_length, blocks["KEYS"])
    wanted = min(triton.cdiv(FULL_GRID, batch * num_kv_heads * row_blocks), key_blocks, MAX_SPLITS)
    split_length = triton.cdiv(key_blocks, max(wanted, 1)) * blocks["KEYS"]
    num_splits = triton.cdiv(prefix_length, split_length) if prefix_length else 0
    grid = (batch * num_kv_heads, num_splits + 1, row_blocks)
    sizes = (num_kv_heads, groups, num_queries, prefix_length, tail_length, split_length)
    return Plan(blocks, grid, sizes, num_splits, split_length)


def mask_arguments(mask: torch.Tensor | None, query: torch.Tensor, keys: tuple[torch.Tensor, ...]) -> tuple:
    """Return pointer and strides of a mask that broadcasts to (B, 1, queries, all keys), as the kernels take them."""
    if mask is None:
        return None, (0, 0, 0, 0)
    shape = (query.shape[0], 1, query.shape[2], sum(key.shape[2] for key in keys))
    mask = mask.expand(shape).view(torch.uint8)
    return mask, mask.stride()


def with_strides(*tensors: torch.Tensor) -> list:
    """Return each tensor and its strides in turn."""
    return [argument for tensor in tensors for argument in (tensor, tensor.stride())]


def reason_against(*tensors: torch.Tensor) -> str | None:
    """Return why these kernels cannot serve queries, keys and values (B, heads, length, K), or None if they can."""
    query, head_dims = tensors[0], [tensor.shape[-1] for tensor in tensors]
    if triton is None:
        return "triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"triton is {triton.__version__}, and older than {OLDEST_TRITON} it takes no tuples of strides"
    compiled = isinstance(_forward_kernel, triton.JITFunction)  # else the interpreter, which takes any device
    if compiled and query.device.type != "cuda":
        return f"the tensors are on {query.device.type}, not on a GPU"
    if compiled and torch.cuda.get_device_capability(query.device) < (8, 0):
        return f"the GPU's compute capability is {torch.cuda.get_device_capability(query.device)}, below (8, 0)"
    if query.dtype not in DTYPES or len({tensor.dtype for tensor in tensors}) > 1:
        return f"the tensors are of {[str(tensor.dtype) for tensor in tensors]}, not all of one of {DTYPES}"
    if not compiled and query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16 as whole numbers"
    if len({tensor.device for tensor in tensors}) > 1:
        return f"the tensors are on {[str(tensor.device) for tensor in tensors]}"
    if len({*head_dims}) > 1 or head_dims[0] > MAX_HEAD_DIM:
        return f"heads are of sizes {head_dims}, not all of one up to {MAX_HEAD_DIM}"
    return None


def attention_forward(step, key, value) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of few queries over prefix and tail, of any strides, and the log-sum-exp of their scores.

    Args:
        step: query (B, H, Q, K), scaling, mask (B, 1, Q, P + T) of bool or None, and None for dropout.
        key, value: prefix (B, H', P, K) and tail (B, H', T, K) of each.

    Returns:
        output (B, H, Q, K) in query's dtype, logsumexp (B, H, Q) in float32. They are 0 and -inf of a query that may
        look nowhere.
    """
    query, scaling, mask, _ = step
    plan = plan_of(query, key[0], key[1].shape[2])
    num_parts = plan.num_splits + 1
    parts = query.new_empty(*query.shape[:3], num_parts, query.shape[3], dtype=torch.float32)
    part_lse = query.new_empty(*query.shape[:3], num_parts, dtype=torch.float32)
    output, logsumexp = query.new_empty(query.shape), part_lse.new_empty(query.shape[:-1])
    with torch.cuda.device_of(query):
        _forward_kernel[plan.grid](
            *with_strides(query, key[0], value[0], key[1], value[1]),
            *mask_arguments(mask, query, key),
            *(parts, parts[..., 0, :].stride(), part_lse, part_lse[..., 0].stride()),
            *plan.sizes,
            scaling,
            **plan.blocks,
        )
        merged = {"HEAD_DIM": query.shape[3], "PARTS": triton.next_power_of_2(num_parts), "DIMS": plan.blocks["DIMS"]}
        _merge_kernel[(logsumexp.numel(),)](parts, part_lse, output, logsumexp, num_parts, **merged)
    return output, logsumexp


def query_backward(step, key, value, grad_output, output, logsumexp) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the queries (B, H, Q, K), and delta (B, H, Q) = Σ grad_output · output, in float32.

    grad_output (B, H, Q, K), and the rest as `attention_forward` took and gave it.
    """
    query, scaling, mask, _ = step
    plan = plan_of(query, key[0], key[1].shape[2])
    num_parts = plan.num_splits + 1
    parts = query.new_empty(*query.shape[:3], num_parts, query.shape[3], dtype=torch.float32)
    grad_query, delta = query.new_empty(query.shape), torch.empty_like(logsumexp)
    with torch.cuda.device_of(query):
        _query_gradient_kernel[plan.grid](
            *with_strides(grad_output, query, key[0], value[0], key[1], value[1]),
            *mask_arguments(mask, query, key),
            *with_strides(output, logsumexp, delta),
            *(parts, parts[..., 0, :].stride()),
            *plan.sizes,
            scaling,
            **plan.blocks,
        )
        merged = {"HEAD_DIM": query.shape[3], "PARTS": triton.next_power_of_2(num_parts), "DIMS": plan.blocks["DIMS"]}
        _sum_kernel[(delta.numel(),)](parts, grad_query, num_parts, **merged)
    return grad_query, delta


def key_backward(step, key, value, grad_output, logsumexp, delta) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of keys and values (B, H', L, K) that the queries (B, H, N, K) of several steps read.

    Sums are in float32 and written once, in key's dtype.

    Args:
        step: query (B, H, N, K), scaling, mask (B, 1, N, L) of bool or None, and None for dropout.
        key, value (B, H', L, K).
        grad_output (B, H, N, K), logsumexp, delta (B, H, N): as the functions above took and gave them, joined.
    """
    query, scaling, mask, _ = step
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, length = key.shape[1:3]
    groups = num_heads // num_kv_heads
    blocks = blocks_of(query, groups * num_queries, bytes_of_keys=8192)
    gradients = torch.empty_like(key), torch.empty_like(value)
    with torch.cuda.device_of(query):
        _key_gradient_kernel[(batch * num_kv_heads, triton.cdiv(length, blocks["KEYS"]))](
            *with_strides(grad_output, query, key, value),
            *mask_arguments(mask, query, (key,)),
            *with_strides(logsumexp, delta, *gradients),
            *(num_kv_heads, groups, num_queries, length, scaling),
            **blocks,
        )
    return gradients
