// Stands in for the CUDA toolkit's header of this name: the two types that TensorRT's headers take from it.
#pragma once

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
