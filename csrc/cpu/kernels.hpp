// What one instruction set offers: plain structs and a table of functions, nothing inline.
//
// Tensors are rows of channels, one row per position (NHWC), all of one task of one element type;
// weights, coefficients, moments and weight gradients are float32. A task covers the images
// [first_image, stop_image); every sum it makes goes to memory of its own. Moments are those of the
// values as they are stored.
#pragma once

#include <cstdint>

namespace fastshift::cpu {

struct Bf16 {
  uint16_t bits;
};

enum Element { kFloat32, kBfloat16, kElements };

struct Geometry {
  int64_t height, width, out_height, out_width;
  int64_t in_channels, out_channels;
  int kernel, stride;
};

// scale * x + shift, and ReLU where asked; x itself where scale is null.
struct Affine {
  const float* scale;
  const float* shift;
  bool relu;
};

// Channel c of position p is element p * row + c * step.
struct Source {
  const void* data;
  int64_t row, step;
};
struct Target {
  void* data;
  int64_t row, step;
};

struct Forward {
  Geometry geometry;
  int64_t first_image, stop_image;
  Source x;
  Affine prologue;      // of x
  const float* weight;  // packed
  Target y;             // step 1; unused where pooled
  Affine epilogue;      // of y
  Source residual;      // added after the epilogue; null: none
  float* pooled;        // [images][out], float32: means over the positions, in place of y; or null
  double* sums;         // [3][out]: a shift, and the sums of (y - shift) and of its square; or null
};

// d raw = gain * g + slope * (raw - mean) + offset: batch norm's backward, g the masked gradient.
struct NormBackward {
  const float *mean, *gain, *slope, *offset;
};

struct Backward {
  Geometry geometry;
  int64_t first_image, stop_image;
  Source x;
  Affine prologue;      // of x
  const float* x_mean;  // of the raw x, for sums
  const float* weight;  // packed for the gradient of x
  Source raw;           // what the convolution gave
  Source gradient;      // of what followed batch norm and activation
  Affine activation;    // of raw
  NormBackward norm;
  Target dx;      // gradient of what the prologue gave, masked; null: not wanted
  Source add;     // added to dx; null: none
  double* sums;   // [2][in]: of dx and of dx * (x - x_mean); or null
  float* dweight; // [out][taps][in], or [taps][channels] of a depthwise unit; added to
};

// y = affine(x) + residual, row by row.
struct Apply {
  int64_t first_row, stop_row, channels;
  Source x;
  Affine affine;
  Source residual;
  Target y;
};

// Sums of the masked gradient and of its product with (raw - mean).
struct Reduce {
  int64_t first_row, stop_row, channels;
  Source raw, gradient;
  Affine activation;
  const float* mean;
  double* sums;  // [2][channels]
};

struct Kernels {
  const char* name;
  int lanes;
  int64_t (*packed_product)(int64_t k, int64_t columns, Element element);  // floats
  // Weights [out][in][taps]; forward: for y, else for the gradient of x.
  void (*pack_product)(const float* weight, int64_t out, int64_t in, int kernel, bool forward,
                       Element element, float* to);
  int64_t (*packed_depthwise)(int64_t channels, int kernel);
  void (*pack_depthwise)(const float* weight, int64_t channels, int kernel, bool forward, float* to);
  int64_t (*scratch)(const Geometry& geometry, bool depthwise);  // floats
  void (*add)(const float* from, int64_t count, float* to);
  // By element type.
  void (*product_forward[kElements])(const Forward& task, float* scratch);
  void (*depthwise_forward[kElements])(const Forward& task, float* scratch);
  void (*product_backward[kElements])(const Backward& task, float* scratch);
  void (*depthwise_backward[kElements])(const Backward& task, float* scratch);
  void (*apply[kElements])(const Apply& task);
  void (*reduce[kElements])(const Reduce& task);
};

}  // namespace fastshift::cpu
