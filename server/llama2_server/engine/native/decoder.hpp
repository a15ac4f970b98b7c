// A model, its threads and the activations of one step: the stages of a step, and how each is cut into chunks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "model.hpp"
#include "thread_pool.hpp"

namespace {

constexpr int CHUNK_BYTES = 1 << 19;  // of weights: some 25 microseconds of reading, so that a lost core delays little
constexpr int PREFILL_ROWS = 48;  // tokens of a prompt in a step: enough that the arithmetic, not the memory, is the limit

// Rows of floats, padded with zeros to whole vectors, each at the start of a cache line: a vector that lies across two
// lines costs two reads.
class Rows {
  public:
    Rows(int rows, int width)
        // One line more, so that the stride is no power of two: else all rows would share a place in the nearest cache.
        : stride(padded(width) + LANES), lines_(static_cast<std::size_t>(rows) * stride / LANES) {}
    float *operator[](int row) { return lines_.data()->lanes + static_cast<std::size_t>(row) * stride; }
    const std::size_t stride;

  private:
    struct alignas(64) Line {
        float lanes[LANES];
    };
    std::vector<Line> lines_;
};

// A model, its threads and the activations of one step.
class Decoder final : Team {
  public:
    Decoder(const Model &model, const Layer *layers, const Kernels &kernels, int threads)
        : Team(threads),
          model_(model),
          layers_(layers, layers + model.layers),
          kernels_(kernels),
          threads_(threads),
          most_rows_(std::max(model.slots, PREFILL_ROWS)),
          query_width_(model.heads * model.head_dim),
          key_width_(model.kv_heads * model.head_dim),
          x_(most_rows_, model.hidden),
          normed_(most_rows_, model.hidden),
          change_(most_rows_, model.hidden),
          qkv_(most_rows_, query_width_ + 2 * key_width_),
          attended_(most_rows_, query_width_),
          gate_up_(most_rows_, 2 * model.inner),
          inner_(most_rows_, model.inner),
          // What `Attention::scratch` has to hold.
          scratch_(threads,
                   attention_tokens(group()) * group() * (2 * padded(model.head_dim) + padded(model.context))) {
        runs_.reserve(most_rows_);
    }

    // Appends one token to each row's slot. The last `wanted` rows get logits (wanted, vocab). Rows of the same slot come
    // in the order of their positions.
    void step(int rows, const std::int32_t *slots, const std::int32_t *tokens, const std::int32_t *positions,
              int wanted, float *logits) {
        rows_ = rows;
        wanted_ = wanted;
        slots_ = slots;
        positions_ = positions;
        logits_ = logits;
        for (int row = 0; row < rows; ++row) {
            const Half *embedded = model_.embedding + static_cast<std::size_t>(tokens[row]) * model_.hidden;
            kernels_.widen(embedded, model_.hidden, x_[row]);
        }
        find_runs();
        stage_ = -1;
        run();
    }

    const Model &model() const { return model_; }
    int most_rows() const { return most_rows_; }

  private:
    // Rows of consecutive tokens of a slot.
    struct Run {
        int first, rows;
    };
    enum Kind { QKV, ATTEND, OUTPUT, GATE_UP, DOWN, STAGES_OF_A_LAYER };

    int group() const { return model_.heads / model_.kv_heads; }
    const Layer &layer() const { return layers_[stage_ / STAGES_OF_A_LAYER]; }

    int next_stage() override {
        if (++stage_ == STAGES_OF_A_LAYER * model_.layers) {
            if (wanted_ == 0) return 0;
            add_change();
            normalise(model_.norm);
            return split(model_.vocab, model_.hidden);
        }
        if (stage_ > STAGES_OF_A_LAYER * model_.layers) return 0;
        switch (stage_ % STAGES_OF_A_LAYER) {
            case QKV:
                if (stage_ > 0) add_change();
                normalise(layer().attention_norm);
                return split(query_width_ + 2 * key_width_, model_.hidden);
            case ATTEND:
                // All rows first: those of a prompt attend to one another.
                for (const Run &run : runs_)
                    for (int head = 0; head < model_.kv_heads; ++head) kernels_.remember(attention(0, run, head));
                return static_cast<int>(runs_.size()) * model_.kv_heads;
            case OUTPUT:
                return split(model_.hidden, query_width_);
            case GATE_UP:
                add_change();
                normalise(layer().mlp_norm);
                return split(model_.inner, 2 * model_.hidden);
            default:
                return split(model_.hidden, model_.inner);
        }
    }

    void run_chunk(int thread, int chunk) override {
        const int begin = chunk * outputs_per_chunk_;
        if (stage_ == STAGES_OF_A_LAYER * model_.layers)
            return multiply(model_.head, model_.vocab, normed_, model_.hidden, begin, logits_, model_.vocab, wanted_);
        switch (stage_ % STAGES_OF_A_LAYER) {
            case QKV:
                return multiply(layer().qkv, query_width_ + 2 * key_width_, normed_, model_.hidden, begin, qkv_[0],
                                qkv_.stride, rows_);
            case ATTEND:
                return kernels_.attend(attention(thread, runs_[chunk / model_.kv_heads], chunk % model_.kv_heads));
            case OUTPUT:
                return multiply(layer().output, model_.hidden, attended_, query_width_, begin, change_[0],
                                change_.stride, rows_);
            case GATE_UP:
                return gate_up(begin);
            default:
                return multiply(layer().down, model_.hidden, inner_, model_.inner, begin, change_[0], change_.stride, rows_);
        }
    }

    // How many chunks a matrix of so many outputs, each of so many weights, comes in.
    int split(int outputs, int width) {
        int per_chunk = outputs;
        if (threads_ > 1) {
            per_chunk = std::min(CHUNK_BYTES / static_cast<int>(width * sizeof(Half)), outputs / (4 * threads_));
            per_chunk = std::max(per_chunk / 4, 1) * 4;  // whole blocks
        }
        outputs_per_chunk_ = per_chunk;
        return (outputs + per_chunk - 1) / per_chunk;
    }

    // The last `rows` of `x` times outputs_per_chunk_ rows of the matrix, from `begin` on.
    void multiply(const Half *weights, int outputs, Rows &x, int width, int begin, float *out, std::size_t out_stride,
                  int rows) {
        const int count = std::min(outputs_per_chunk_, outputs - begin);
        kernels_.multiply(weights + static_cast<std::size_t>(begin) * width, count, width, x[rows_ - rows], x.stride,
                          rows, out + begin, out_stride);
    }

    void gate_up(int begin) {
        const int inner = model_.inner, count = std::min(outputs_per_chunk_, inner - begin);
        multiply(layer().gate_up, inner, normed_, model_.hidden, begin, gate_up_[0], gate_up_.stride, rows_);
        multiply(layer().gate_up + static_cast<std::size_t>(inner) * model_.hidden, inner, normed_, model_.hidden,
                 begin, gate_up_[0] + inner, gate_up_.stride, rows_);
        for (int row = 0; row < rows_; ++row) {
            const float *gates = gate_up_[row] + begin;
            kernels_.gate(gates, gates + inner, count, inner_[row] + begin);
        }
    }

    // Rows that follow one another in a slot share each look at its keys, a few at a time.
    void find_runs() {
        runs_.clear();
        for (int row = 0; row < rows_; ++row) {
            const bool follows = row > 0 && slots_[row] == slots_[row - 1] && positions_[row] == positions_[row - 1] + 1;
            if (follows && runs_.back().rows < attention_tokens(group()))
                ++runs_.back().rows;
            else
                runs_.push_back({row, 1});
        }
    }

    Attention attention(int thread, Run run, int head) {
        const int dim = model_.head_dim, row = run.first, position = positions_[row];
        const std::size_t cached = static_cast<std::size_t>(slots_[row]) * model_.kv_heads + head;
        const std::size_t offset = cached * model_.context * dim;
        const float *key = qkv_[row] + query_width_ + head * dim;
        Attention attention;
        attention.queries = qkv_[row] + head * group() * dim;
        attention.key = key;
        attention.value = key + key_width_;
        attention.stride = qkv_.stride;
        attention.cosines = model_.cosines + static_cast<std::size_t>(position) * dim;
        attention.sines = model_.sines + static_cast<std::size_t>(position) * dim;
        attention.keys = layer().keys + offset;
        attention.values = layer().values + offset;
        attention.tokens = run.rows;
        attention.position = position;
        attention.group = group();
        attention.head_dim = dim;
        attention.out = attended_[row] + head * group() * dim;
        attention.out_stride = attended_.stride;
        attention.scratch = scratch_[thread];
        return attention;
    }

    void add_change() {
        for (int row = 0; row < rows_; ++row) {
            float *x = x_[row];
            const float *change = change_[row];
            for (int i = 0; i < model_.hidden; ++i) x[i] += change[i];
        }
    }

    void normalise(const Half *weights) {
        for (int row = 0; row < rows_; ++row)
            kernels_.normalise(x_[row], weights, model_.hidden, model_.norm_epsilon, normed_[row]);
    }

    const Model model_;
    const std::vector<Layer> layers_;
    const Kernels &kernels_;
    const int threads_, most_rows_, query_width_, key_width_;
    Rows x_, normed_, change_, qkv_, attended_, gate_up_, inner_, scratch_;
    // The step under way. Written by whoever opens a stage, before its ticket; read after a chunk of it was taken.
    int rows_ = 0, wanted_ = 0, stage_ = 0, outputs_per_chunk_ = 0;
    std::vector<Run> runs_;
    const std::int32_t *slots_ = nullptr, *positions_ = nullptr;
    float *logits_ = nullptr;
};

}  // namespace
