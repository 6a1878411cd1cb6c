// Lazy arrays and their evaluation, in the order of events, fences, handlers
// and commits that MLX's evaluator produces. `Regime` is one of its two
// generations of Metal back end.
#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "host_encoder.h"

namespace host {

// Where an exception came out, for the report.
inline thread_local const char* doing = "encode";

template <class Regime>
struct Node {
  enum Status { kUnscheduled, kEvaluated, kAvailable };
  using Ptr = std::shared_ptr<Node>;

  Stream stream{0, true};
  std::vector<Ptr> inputs;
  std::shared_ptr<Kernel> kernel;  // none: writes nothing
  std::shared_ptr<Cell> cell = std::make_shared<Cell>();
  uint64_t expected = 0;
  Status status = kUnscheduled;
  std::optional<typename Regime::Event> event;
};

template <class Regime>
class Graph {
 public:
  using NodeT = Node<Regime>;
  using Ptr = typename NodeT::Ptr;
  using Event = typename Regime::Event;
  using Fence = typename Regime::Fence;

  static Ptr leaf(uint64_t value) {
    auto node = std::make_shared<NodeT>();
    node->cell->value = node->expected = value;
    node->status = NodeT::kAvailable;
    return node;
  }

  static Ptr op(Stream stream, std::vector<Ptr> inputs) {
    static std::atomic<uint64_t> operations{0};
    auto node = std::make_shared<NodeT>();
    node->stream = stream;
    node->kernel = std::make_shared<Kernel>();
    node->kernel->operation = node->expected = ++operations;
    node->kernel->output = node->cell;
    for (auto& input : inputs) {
      node->kernel->inputs.push_back(input->cell);
      node->expected = mix(node->expected, input->expected);
    }
    node->inputs = std::move(inputs);
    return node;
  }

  static Ptr chain(Stream stream, Ptr from, int length) {
    for (int i = 0; i < length; ++i) from = op(stream, {from});
    return from;
  }

  static void eval(const std::vector<Ptr>& outputs) {
    if (all_scheduled(outputs)) {
      for (auto& output : outputs) wait(output);
      return;
    }
    wait(Evaluation(outputs, false).run());
  }

  static void async_eval(const std::vector<Ptr>& outputs) {
    if (!all_scheduled(outputs)) Evaluation(outputs, true).run();
  }

  static uint64_t item(const Ptr& node) {
    if (node->status == NodeT::kUnscheduled) {
      eval({node});
    } else {
      wait(node);
    }
    return node->cell->value.load();
  }

  static void wait(const Ptr& node) {
    if (is_available(node)) return;
    if (node->event) {
      doing = "wait";
      node->event->wait();
      node->event.reset();
    }
    node->status = NodeT::kAvailable;
  }

 private:
  static bool is_available(const Ptr& node) {
    if (node->status == NodeT::kAvailable) return true;
    if (node->status != NodeT::kEvaluated) return false;
    if (node->event && !node->event->is_signaled()) return false;
    node->event.reset();
    node->status = NodeT::kAvailable;
    return true;
  }

  static bool all_scheduled(const std::vector<Ptr>& nodes) {
    for (auto& node : nodes) {
      if (node->status == NodeT::kUnscheduled) return false;
    }
    return true;
  }

  class Evaluation {
   public:
    Evaluation(const std::vector<Ptr>& outputs, bool async) : async_(async) {
      synchronizer_ = std::make_shared<NodeT>();
      for (auto& output : outputs) {
        if (output->status == NodeT::kUnscheduled) {
          synchronizer_->stream = output->stream;
          break;
        }
      }
      synchronizer_->inputs = outputs;
      synchronizer_->event = event_of(synchronizer_->stream);
      count_uses(synchronizer_);
      order();
    }

    Ptr run() {
      doing = "encode";
      try {
        for (auto& node : tape_) evaluate(node);
      } catch (...) {
        Regime::abandon(events_, open_streams_);
        throw;
      }
      std::vector<Stream> open(open_streams_.begin(), open_streams_.end());
      // It has them in a hash table.
      if (is_before_0_31()) std::reverse(open.begin(), open.end());
      for (Stream stream : open) {
        auto event = events_.find(stream.index);
        if (event != events_.end()) event->second.signal(stream);
        if (stream.gpu) Regime::finalize(stream);
      }
      return synchronizer_;
    }

   private:
    // How many use each array; and which cross between streams.
    void count_uses(const Ptr& node) {
      for (auto& input : node->inputs) {
        if (input->status != NodeT::kUnscheduled) continue;
        if (!(input->stream == node->stream)) crossing_.insert(input.get());
        if (uses_[input.get()]++ == 0) count_uses(input);
      }
    }

    // Inputs before what uses them: breadth first from the end, and depth first
    // where that becomes wider than MLX's MLX_BFS_MAX_WIDTH.
    void order() {
      constexpr size_t kMaxWidth = 20;
      std::vector<std::pair<Ptr, size_t>> put_off;
      std::vector<Ptr> reversed{synchronizer_};
      for (size_t next = 0; next < reversed.size() || !put_off.empty();) {
        size_t input = 0;
        Ptr node;
        if (next < reversed.size()) {
          node = reversed[next++];
        } else {
          std::tie(node, input) = put_off.back();
          put_off.pop_back();
        }
        for (; input < node->inputs.size(); ++input) {
          const Ptr& wanted = node->inputs[input];
          if (wanted->status != NodeT::kUnscheduled) continue;
          if (reversed.size() - next >= kMaxWidth) {
            put_off.emplace_back(node, input);
            break;
          }
          if (--uses_[wanted.get()] == 0) reversed.push_back(wanted);
        }
      }
      tape_.assign(reversed.rbegin(), reversed.rend());
    }

    Event& event_of(Stream stream) {
      auto [place, added] = events_.try_emplace(stream.index, stream);
      if (added) place->second.set_value(1);
      return place->second;
    }

    void wait_for_inputs(const Ptr& node) {
      for (auto& input : node->inputs) {
        // Also on the stream that it is computed on.
        if (crossing_.count(input.get())) {
          fences_.at(input->stream.index).wait(node->stream);
        } else if (input->event) {
          if (input->event->is_signaled()) {
            input->event.reset();
          } else if (!(input->event->stream() == node->stream)) {
            input->event->wait(node->stream);
          }
        }
      }
    }

    void evaluate(const Ptr& node) {
      Stream stream = node->stream;
      open_streams_.insert(stream);
      if (async_) node->event = event_of(stream);
      wait_for_inputs(node);
      if (node->kernel && node->kernel->encode_us > 0)
        ::usleep(node->kernel->encode_us);
      if (stream.gpu) {
        ScopedPool pool;
        Regime::eval_gpu(stream, node->kernel);
      } else if (node->kernel) {
        Regime::eval_cpu(stream, node->kernel);
      }
      if (tasks().too_many()) {
        for (Stream open : open_streams_) {
          if (open.gpu) Regime::finalize(open);
        }
        tasks().wait_for_one();
      }
      if (crossing_.count(node.get())) {
        auto [fence, added] = fences_.try_emplace(stream.index, stream);
        fence->second.update(stream);
      }
      node->status = NodeT::kEvaluated;
      node->inputs.clear();
    }

    bool async_;
    Ptr synchronizer_;
    std::vector<Ptr> tape_;
    std::unordered_map<NodeT*, int> uses_;
    std::unordered_set<NodeT*> crossing_;
    std::map<int, Event> events_;
    std::map<int, Fence> fences_;
    std::set<Stream> open_streams_;
  };
};

}  // namespace host
