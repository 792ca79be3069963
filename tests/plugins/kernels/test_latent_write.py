"""latent_write against the contract's torch reference, bit by bit."""

import pytest
import torch

from deepseek_trt.export.ops.paging import write_latents
from deepseek_trt.plugins.kernels import chips, latent_write

CASES = [  # dtype, width, page, past, new, steps, tiles of
    (torch.float32, 80, 64, (0,), (1,), 1, chips.INTERPRETER),
    (torch.float32, 24, 4, (0, 5, 3), (9, 2, 4), 9, chips.INTERPRETER),
    (torch.float16, 80, 16, (15, 16), (3, 1), 5, 86),
    (torch.bfloat16, 576, 16, (1, 0), (0, 7), 7, 90),
]


@pytest.mark.parametrize(("dtype", "width", "page", "past", "new", "steps", "sm"), CASES)
def test_writes_what_the_reference_writes(dtype, width, page, past, new, steps, sm, device, make_pages, use_tiles):
    torch.manual_seed(0)
    use_tiles(sm, latent_write)
    pages = make_pages(dtype, past, new, width, page, device)
    latent = torch.randn(len(past), steps, width).to(dtype).to(device)
    lengths = torch.tensor(new, dtype=torch.int32, device=device)
    present = latent_write.write(pages.pool, latent, pages.table, pages.past, lengths)
    # the reference looks padding's pages up too, and only then sends it to page 0: give it entries it can read
    table = torch.where(pages.table == pages.FAR, 0, pages.table)
    expected = write_latents(pages.pool, latent, table, pages.past, lengths)
    assert torch.equal(present[1:].nan_to_num(9.0), expected[1:].nan_to_num(9.0))


def test_without_padding_scratch_stays(device, make_pages):
    pages = make_pages(torch.float32, (2, 0), (1, 1), 8, 4, device)
    latent = torch.randn(2, 1, 8, device=device)
    present = latent_write.write(pages.pool, latent, pages.table, pages.past, torch.ones_like(pages.past))
    for row, past in enumerate(pages.lengths):
        assert torch.equal(pages.read(present, row, past + 1)[-1], latent[row, 0].cpu().double())
    assert present[0].isnan().all(), "the scratch page was written"
