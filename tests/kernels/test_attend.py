"""Attention in two parts is attention."""

import pytest
import torch
import torch.nn.functional as F

from stripedrag.kernels.attention import attend, in_parts


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("past", [0, 1, 700])
@pytest.mark.parametrize("new", [1, 2, 65])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_new_tokens_read_what_came_before_and_themselves_causally(dtype, tolerance, past, new, kv_heads):
    torch.manual_seed(0)
    room = torch.randn(2, 2, kv_heads, past + new + 9, 16, dtype=dtype)  # as in a buffer: heads are not contiguous
    k, v = room[:, :, :, : past + new]
    q = torch.randn(2, new, 6, 16, dtype=dtype).transpose(1, 2)
    mask = torch.ones(new, past + new, dtype=torch.bool).tril(past)
    wide = (t.double() for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    for given in (None, mask[None, None]):
        torch.testing.assert_close(attend(q, k, v, given), expected.to(dtype), rtol=0, atol=tolerance)
    with torch.no_grad():
        for read in (attend, in_parts):
            torch.testing.assert_close(read(q, k, v), expected.to(dtype), rtol=0, atol=tolerance)
