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
  // Of each image the output lines [first_line, stop_line): all of them, unless the task is one
  // image's and none of it is pooled.
  int64_t first_line, stop_line;
  // Lines of an image of x that are held: fewer than its height are a ring, which a depthwise unit
  // finds line i of at i % x_lines. A product reads x as it reads a whole image.
  int64_t x_lines;
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

// The pointwise unit before a depthwise one, taken along in its backward pass: batch norm and
// convolution are linear in g, the masked gradient of what norm and activation gave, so that it
// counts as soon as it is known; what the sums over all of g bring is added by `correct`.
struct Expanding {
  Geometry geometry;
  Source x;
  Affine prologue;      // of x
  const float* centre;  // [in], subtracted from x where sums would cancel
  const float* weight;  // packed for the gradient of x
  const float* gain;    // [out]
  float* dx;            // [images][positions][in]: gain * g times the weights; null: not wanted
  float* dweight;       // [out][in]: gain * g times (x - centre)
  float* squares;       // [in][in]: of (x - centre)
  double* sums;         // [in]: of (x - centre); added to
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
  float* dweight; // [out][taps][in], or [taps][channels] of a depthwise unit
  const Expanding* before;  // of a depthwise unit: takes the gradient of x in place of dx; or null
  // Of `correct` alone: dx = partial + constant + weight * (what the prologue gave - centre).
  const float *centre, *constant, *partial;
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
  int64_t (*packed_product)(int64_t k, int64_t columns, Element element);  // floats
  // Weights [out][in][taps]; forward: for y, else for the gradient of x.
  void (*pack_product)(const float* weight, int64_t out, int64_t in, int kernel, bool forward,
                       Element element, float* to);
  int64_t (*packed_depthwise)(int64_t channels, int kernel);
  void (*pack_depthwise)(const float* weight, int64_t channels, int kernel, bool forward, float* to);
  int64_t (*scratch)(const Geometry& geometry, bool depthwise);  // floats
  // Of a depthwise unit's backward pass with the unit before it.
  int64_t (*expanding_scratch)(const Geometry& geometry, const Geometry& before);
  void (*add)(const float* from, int64_t count, float* to);
  // to[m, n] = left[rows, m]^T * right[rows, n].
  void (*outer)(int64_t rows, int64_t m, int64_t n, const float* left, int64_t left_row,
                const float* right, int64_t right_row, float* to, int64_t to_row);
  // By element type.
  void (*product_forward[kElements])(const Forward& task, float* scratch);
  void (*depthwise_forward[kElements])(const Forward& task, float* scratch);
  void (*product_backward[kElements])(const Backward& task, float* scratch);
  void (*depthwise_backward[kElements])(const Backward& task, float* scratch);
  void (*correct[kElements])(const Backward& task, float* scratch);
  // A mean of a pointwise unit's first rows of x.
  void (*centre[kElements])(const Geometry& geometry, const Source& x, const Affine& prologue,
                            float* to);
  void (*apply[kElements])(const Apply& task);
  void (*reduce[kElements])(const Reduce& task);
};

}  // namespace fastshift::cpu
