"""A CUDA card without arithmetic, for tests on hosts that have no GPU.

    python -m tools.null_gpu script.py argument ...

runs a script, in a fresh interpreter of this environment, for whose torch `torch.cuda` is there. What it asks the card
for, by environment variables: NULLGPU_CC (compute capability: 89 is a 4090's and the default, 75 a T4's, which has no
bfloat16), NULLGPU_BYTES (memory), NULLGPU_SMS (multiprocessors), NULLGPU_NAME.

Shown by it: which way code goes on a GPU. Device, dtype and autocast decisions, Unsloth's CUDA branch, streams and
pinned memory, torch's real caching allocator and with it the bytes that are allocated. With on_cpu.ComputedOnCPU also
what comes out, since PyTorch's operations are then computed by their CPU kernels, in the memory of the card.

Not shown: what CUDA and Triton kernels compute (they are counted and not run), what torch.compile makes of code, and
anything about speed.

It refuses to load where there is a real GPU. Nothing of it belongs to the package or its wheel.

    card.h, runtime.c, driver.c    the card, and the functions of CUDA that mean something without arithmetic
    build.py                       compiles them into one library; all other functions of CUDA become empty ones
    __main__.py                    the launcher
    on_cpu.py                      the dispatch mode that computes on the CPU
"""
