// Buffers of XLA's as arrays of a type that is known when they come.
#pragma once

#include "dtypes.h"
#include "view.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnorm {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using ffi::Error;
using ffi::ErrorCode;
using ffi::ThreadPool;
using Result = ffi::Result<AnyBuffer>;

template <class T>
struct Type {
  using type = T;
};

inline Error unknown(const char* what) { return Error(ErrorCode::kInvalidArgument, what); }

// Calls f with the type of the numbers in a buffer.
template <class F>
Error of_type(DataType dtype, const F& f) {
  switch (dtype) {
    case DataType::F32: return f(Type<float>());
    case DataType::F64: return f(Type<double>());
    case DataType::BF16: return f(Type<BFloat16>());
    case DataType::F16: return f(Type<Float16>());
    default: return unknown("no floating point numbers of a type that is known");
  }
}

template <class T>
const T* data(const AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}
template <class T>
T* data(Result buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

}  // namespace jaxnorm
