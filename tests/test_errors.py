"""The table of codes and the classification of messages."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_safe
from mlx_safe import errors, testing

# Written out here again on purpose: the contract, not the implementation.
EXPECTED = {
    0x2: (errors.MetalTimeoutError, True, False),
    0x3: (errors.MetalHangError, True, False),
    0x4: (errors.MetalDeviceLostError, False, True),
    0x5: (errors.MetalInnocentVictimError, True, False),
    0x6: (errors.MetalError, True, False),
    0x8: (errors.MetalOutOfMemoryError, True, False),
    0x9: (errors.MetalAccessError, False, False),
    0xA: (errors.MetalAccessError, False, False),
    0xB: (errors.MetalAccessError, False, False),
    0xE: (errors.MetalInteractivityError, True, False),
    0x10: (errors.MetalAccessError, False, False),
    0x11: (errors.MetalAccessError, False, False),
}


def test_the_table_is_the_contracts() -> None:
    found = {
        code: (kind.error, kind.retryable, kind.fatal)
        for code, kind in errors.FAULT_KINDS.items()
    }
    assert found == EXPECTED


@pytest.mark.parametrize("code", EXPECTED)
def test_mlx_message_becomes_the_typed_error(code: int) -> None:
    raised = RuntimeError(testing.metal_message(code))
    typed = errors.from_exception(raised)
    assert type(typed) is EXPECTED[code][0]
    assert typed.code == code
    assert (typed.retryable, typed.fatal) == EXPECTED[code][1:]
    assert str(typed) == str(raised)
    assert isinstance(typed, RuntimeError)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("[METAL] Command buffer execution failed: Internal Error (0000000e)", 0xE),
        (
            "[METAL] Command buffer execution failed: Internal Error "
            "(0000000e:Internal Error)",
            0xE,
        ),
        (
            "[METAL] Command buffer execution failed: Unzureichender Speicher "
            "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
            8,
        ),
        (
            "[METAL] Command buffer execution failed: x "
            "(00000002:kIOAccelCommandBufferCallbackErrorTimeout)",
            2,
        ),
        ("[METAL] Command buffer execution failed: something else", -1),
        ("[METAL] Command buffer execution failed: (short) (8) (0000010a:x)", 0x10A),
    ],
)
def test_the_number_decides_not_the_wording(message: str, code: int) -> None:
    typed = errors.from_exception(RuntimeError(message))
    assert typed is not None
    assert typed.code == code


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[metal::malloc] Attempting to allocate 8 bytes (00000008:x)"),
        RuntimeError("There is no Stream(gpu, 0) in current thread."),
        ValueError(testing.metal_message(8)),
    ],
)
def test_other_errors_are_not_faults(error: Exception) -> None:
    assert errors.from_exception(error) is None


def test_unknown_codes_are_plain_retryable_metal_errors() -> None:
    typed = errors.from_exception(RuntimeError(testing.metal_message(0x7)))
    assert type(typed) is mlx_safe.MetalError
    assert (typed.code, typed.retryable, typed.fatal) == (7, True, False)


@given(st.text())
def test_no_message_breaks_the_classification(text: str) -> None:
    typed = errors.from_exception(
        RuntimeError("Command buffer execution failed: " + text)
    )
    assert typed is not None
    assert typed.code >= -1 or typed.name


@given(st.integers(0, 0x7FFFFFFF))
def test_every_number_is_read_back(code: int) -> None:
    typed = errors.from_exception(RuntimeError(testing.metal_message(code)))
    assert typed is not None
    assert typed.code == code


def test_errors_survive_copying_and_pickling() -> None:
    error = errors.MetalOutOfMemoryError("text", code=8)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is type(error)
        assert (str(twin), twin.code, twin.faults) == ("text", 8, ())


# As MLX 0.32's CUDA backend writes them: its own source text, CUDA's own words.
CUDA_MESSAGES = [
    ("cudaMallocAsync(&data, size, stream) failed: out of memory", 2),
    ("cudaMallocManaged(&data, size) failed: out of memory", 2),
    (
        "cudaGraphInstantiate(&handle_, graph, nullptr, nullptr, 0) failed: "
        "out of memory",
        2,
    ),
    ("cuLaunchKernel failed: out of memory", 2),
    ("cublasCreate(&handle) failed with code: 3.", 2),
    ("cufftMakePlan1d failed with code: 2.", 2),
    (
        "cudnnCreate(&handle_) failed: "
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.",
        2,
    ),
    ("cudaGetLastError() failed: unspecified launch failure", 719),
    ("cudaStreamSynchronize(stream_) failed: misaligned address", 716),
    (
        "cudaMallocAsync(&data, size, stream) failed: "
        "an illegal memory access was encountered",
        700,
    ),
    ("cudaGetLastError() failed: device-side assert triggered", 710),
    ("cudaStreamSynchronize(s) failed: uncorrectable ECC error encountered", 214),
    (
        "cudaMemGetInfo(&free, &total_memory_) failed: "
        "no CUDA-capable device is detected",
        100,
    ),
    ("cudaGetDevice(&d) failed: words that CUDA 99 has", -1),
    ("cublasLtMatmul(handle) failed with code: 7.", -1),
]


@pytest.mark.parametrize(("message", "code"), CUDA_MESSAGES)
def test_what_cuda_says_is_classified_by_its_number(message: str, code: int) -> None:
    typed = errors.from_exception(RuntimeError(message))
    assert isinstance(typed, errors.CudaError)
    assert typed.code == code
    assert isinstance(typed, errors.OutOfMemoryError) == (code == 2)
    lost = code in (700, 710, 716, 719, 214)
    assert isinstance(typed, errors.DeviceLostError) == typed.fatal == lost
    assert typed.retryable == (code in (2, -1))


@pytest.mark.parametrize(
    "message",
    [
        "connect() failed: out of memory",
        "cut failed: out of memory",
        "the cuda call has failed: out of memory",
        "Can not find algorithm for matmul.",
        "[nccl] bind() failed: Address already in use",
    ],
)
def test_other_failures_are_not_cudas(message: str) -> None:
    assert errors.from_exception(RuntimeError(message)) is None


def test_both_families_are_caught_by_one_base() -> None:
    metal = errors.from_exception(RuntimeError(testing.metal_message(8)))
    cuda = errors.from_exception(RuntimeError(CUDA_MESSAGES[0][0]))
    for error in (metal, cuda):
        assert isinstance(error, errors.GPUError)
        assert isinstance(error, errors.OutOfMemoryError)
    assert not isinstance(cuda, errors.MetalError)
    assert not isinstance(metal, errors.CudaError)


def test_errors_of_cuda_survive_copying_and_pickling() -> None:
    error = errors.CudaDeviceLostError("text", code=719)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is type(error)
        assert (str(twin), twin.code, twin.fatal) == ("text", 719, True)
