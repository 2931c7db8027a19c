// EpochProtocol through every interleaving of its ranks, under C++'s release and acquire: each load
// may see any value stored so far (a stale one only makes a rank wait longer), and one that
// satisfies its rank brings along what happened before that very store. An access to a slot that is
// not ordered after the accesses it conflicts with is an error, as is one to the wrong epoch.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "comm/epoch_protocol.h"

namespace deinfer {
namespace {

constexpr int kMaxRanks = 4;
constexpr int kMaxEpochs = 6;
// Per rank: how many of its steps are known to have happened.
using VectorClock = std::array<std::uint8_t, kMaxRanks>;

/// What the rank whose step is being tried knows, and which of the values stored it loads.
struct Step {
  VectorClock clock{};
  std::uint64_t loads = 0;
  bool release_stores = true;
  bool acquire_loads = true;
};
Step step;

struct ModelCounter {
  std::uint64_t value = 0;
  std::array<VectorClock, kMaxEpochs + 1> released{};  // by the store of each value

  std::uint64_t load(std::memory_order order) const {
    std::uint64_t loaded = std::min(step.loads, value);
    if (step.acquire_loads && order == std::memory_order_acquire) {
      for (std::size_t i = 0; i < kMaxRanks; ++i) {
        step.clock[i] = std::max(step.clock[i], released[loaded][i]);
      }
    }
    return loaded;
  }
  void store(std::uint64_t stored, std::memory_order order) {
    value = stored;
    if (step.release_stores && order == std::memory_order_release) released[stored] = step.clock;
  }
};

enum class Broken {
  kNothing,
  kWritesWithoutWaiting,  // for the readers of the exchange before in the slot
  kWaitsForOwnReaderOnly,
  kStartsBeforeWriting,
  kReadsWithoutWaiting,
  kFinishesBeforeReading,
  kRelaxedStores,
  kRelaxedLoads,
  kTooManyUnderWay,
};

struct Case {
  int ranks;
  int ring;
  int epochs;
  int under_way;  // exchanges that a rank has started before it waits for the first
  Broken broken = Broken::kNothing;
};

enum class Action { kWaitFree, kWrite, kStart, kWaitStarted, kRead, kFinish };
struct Instruction {
  Action action;
  int epoch;
  int peer;
};

/// What each rank does, as LocalCommunicator and its callers do it.
std::vector<Instruction> program(const Case& c, int rank) {
  std::vector<Instruction> all;
  auto for_peers = [&](Action action, int epoch) {
    for (int peer = 0; peer < c.ranks; ++peer) all.push_back({action, epoch, peer});
  };
  for (int i = 0; i < c.epochs + c.under_way - 1; ++i) {
    if (i < c.epochs) {
      if (c.broken == Broken::kWaitsForOwnReaderOnly) {
        all.push_back({Action::kWaitFree, i, rank});
      } else if (c.broken != Broken::kWritesWithoutWaiting) {
        for_peers(Action::kWaitFree, i);
      }
      bool swap = c.broken == Broken::kStartsBeforeWriting;
      all.push_back({swap ? Action::kStart : Action::kWrite, i, rank});
      all.push_back({swap ? Action::kWrite : Action::kStart, i, rank});
    }
    int oldest = i - c.under_way + 1;
    if (oldest < 0) continue;
    if (c.broken != Broken::kReadsWithoutWaiting) for_peers(Action::kWaitStarted, oldest);
    if (c.broken == Broken::kFinishesBeforeReading) all.push_back({Action::kFinish, oldest, rank});
    for_peers(Action::kRead, oldest);
    if (c.broken != Broken::kFinishesBeforeReading) all.push_back({Action::kFinish, oldest, rank});
  }
  return all;
}

struct Slot {
  std::uint8_t epochs = 0;   // of the exchange in it, plus 1
  std::uint8_t written = 0;  // the writer's step
  VectorClock read{};        // each reader's last step on it
};

/// Counts the states reached, or says what went wrong.
class Checker {
 public:
  explicit Checker(const Case& c) : case_(c) {
    for (int rank = 0; rank < c.ranks; ++rank) programs_.push_back(program(c, rank));
  }

  std::string run() {
    step = {};
    step.release_stores = case_.broken != Broken::kRelaxedStores;
    step.acquire_loads = case_.broken != Broken::kRelaxedLoads;
    visit(State(case_));
    bool finished = false;
    while (!open_.empty()) {
      State state = std::move(open_.back());
      open_.pop_back();
      bool moved = false;
      bool done = true;
      for (int rank = 0; rank < case_.ranks; ++rank) {
        if (state.pc(rank) == programs_[index(rank)].size()) continue;
        done = false;
        if (std::optional<std::string> error = advance(state, rank, moved)) return *error;
      }
      if (done) finished = true;
      if (!done && !moved) return "deadlock";
    }
    return finished ? "ok" : "never finishes";
  }

  std::size_t states() const { return seen_.size(); }

 private:
  struct State {
    explicit State(const Case& c)
        : protocol(c.ranks, c.ring), clocks(index(c.ranks)), slots(index(c.ranks * c.ring)) {}
    std::size_t pc(int rank) const { return clocks[index(rank)][index(rank)]; }

    EpochProtocol<ModelCounter> protocol;
    std::vector<VectorClock> clocks;  // a rank's own entry counts its instructions
    std::vector<Slot> slots;
    std::string history;  // the clocks released by stores: what the protocol holds
  };

  static std::size_t index(int i) { return static_cast<std::size_t>(i); }

  /// Tries the next instruction of `rank` with every value it might load.
  std::optional<std::string> advance(const State& state, int rank, bool& moved) {
    Instruction in = programs_[index(rank)][state.pc(rank)];
    bool loads = in.action == Action::kWaitFree || in.action == Action::kWaitStarted;
    auto epoch = static_cast<std::uint64_t>(in.epoch);
    for (int value = 0; value <= (loads ? case_.epochs : 0); ++value) {
      step.clock = state.clocks[index(rank)];
      step.loads = static_cast<std::uint64_t>(value);
      if (in.action == Action::kWaitFree) {
        if (!state.protocol.slot_is_free(in.peer, epoch)) continue;
      } else if (in.action == Action::kWaitStarted) {
        if (!state.protocol.has_started(in.peer, epoch)) continue;
      }
      State next = state;
      ++step.clock[index(rank)];
      if (in.action == Action::kStart) next.protocol.start(rank, epoch);
      if (in.action == Action::kFinish) next.protocol.finish(rank, epoch);
      if (in.action == Action::kStart || in.action == Action::kFinish) record(next, rank, in);
      Slot& slot = next.slots[index(in.peer * case_.ring + in.epoch % case_.ring)];
      if (in.action == Action::kWrite) {
        for (int reader = 0; reader < case_.ranks; ++reader) {
          if (slot.epochs > 0 && slot.read[index(reader)] == 0) return "overwrites unread data";
          if (slot.read[index(reader)] > step.clock[index(reader)]) return "overwrites while read";
        }
        slot = {static_cast<std::uint8_t>(in.epoch + 1), step.clock[index(rank)], {}};
      }
      if (in.action == Action::kRead) {
        if (slot.epochs != in.epoch + 1) return "reads a wrong epoch";
        if (slot.written > step.clock[index(in.peer)]) return "reads unordered data";
        slot.read[index(rank)] = step.clock[index(rank)];
      }
      next.clocks[index(rank)] = step.clock;
      moved = true;
      visit(std::move(next));
      // A later value would teach the rank more, and what it knows only rules errors out.
      break;
    }
    return std::nullopt;
  }

  void record(State& state, int rank, const Instruction& in) {
    std::size_t counter = index(rank * 2 + (in.action == Action::kStart ? 0 : 1));
    std::size_t at = (counter * index(case_.epochs) + index(in.epoch)) * kMaxRanks;
    state.history.resize(index(case_.ranks * 2 * case_.epochs) * kMaxRanks);
    for (std::size_t i = 0; i < kMaxRanks; ++i) {
      state.history[at + i] = static_cast<char>(step.clock[i]);
    }
  }

  void visit(State state) {
    std::string key = state.history;
    auto put = [&](const VectorClock& clock) {
      for (std::uint8_t time : clock) key.push_back(static_cast<char>(time));
    };
    for (const VectorClock& clock : state.clocks) put(clock);
    for (const Slot& slot : state.slots) {
      key.push_back(static_cast<char>(slot.epochs));
      key.push_back(static_cast<char>(slot.written));
      put(slot.read);
    }
    if (seen_.insert(std::move(key)).second) open_.push_back(std::move(state));
  }

  const Case case_;
  std::vector<std::vector<Instruction>> programs_;
  std::unordered_set<std::string> seen_;
  std::vector<State> open_;
};

std::string verdict(const Case& c) { return Checker(c).run(); }

TEST(CommunicatorProtocol, HoldsInEveryInterleaving) {
  for (Case c :
       {Case{1, 1, 3, 1}, Case{2, 1, 6, 1}, Case{2, 2, 6, 1}, Case{2, 2, 6, 2}, Case{2, 3, 6, 2},
        Case{2, 4, 6, 4}, Case{3, 1, 4, 1}, Case{3, 2, 5, 2}, Case{3, 3, 5, 3}, Case{4, 1, 2, 1}}) {
    Checker checker(c);
    EXPECT_EQ(checker.run(), "ok") << c.ranks << " ranks, ring " << c.ring << ", " << c.epochs
                                   << " epochs, " << c.under_way << " under way";
    RecordProperty(std::to_string(c.ranks) + "x" + std::to_string(c.ring) + "x" +
                       std::to_string(c.epochs) + "x" + std::to_string(c.under_way) + " states",
                   static_cast<int>(checker.states()));
  }
}

/// What kernels/cuda/exchange.h rests on: with two slots and one exchange at a time, who has
/// started e + 1 has read e.
TEST(CommunicatorProtocol, TwoSlotsInTurnNeedNoWordOfWhoHasFinished) {
  EXPECT_EQ(verdict({2, 2, 6, 1, Broken::kWritesWithoutWaiting}), "ok");
  EXPECT_EQ(verdict({3, 2, 4, 1, Broken::kWritesWithoutWaiting}), "ok");
  EXPECT_EQ(verdict({2, 1, 4, 1, Broken::kWritesWithoutWaiting}), "overwrites unread data");
}

TEST(CommunicatorProtocol, TheCheckFindsEveryFlaw) {
  auto flaw = [](int ring, int under_way, Broken broken) {
    return verdict({2, ring, 4, under_way, broken});
  };
  EXPECT_EQ(flaw(1, 1, Broken::kWritesWithoutWaiting), "overwrites unread data");
  EXPECT_EQ(flaw(1, 1, Broken::kWaitsForOwnReaderOnly), "overwrites unread data");
  EXPECT_EQ(flaw(2, 2, Broken::kWritesWithoutWaiting), "overwrites unread data");
  EXPECT_EQ(flaw(2, 1, Broken::kStartsBeforeWriting), "reads a wrong epoch");
  EXPECT_EQ(flaw(2, 1, Broken::kReadsWithoutWaiting), "reads a wrong epoch");
  EXPECT_EQ(flaw(1, 1, Broken::kFinishesBeforeReading), "overwrites unread data");
  EXPECT_EQ(flaw(2, 1, Broken::kRelaxedStores), "reads unordered data");
  EXPECT_EQ(flaw(2, 1, Broken::kRelaxedLoads), "reads unordered data");
  EXPECT_EQ(flaw(1, 2, Broken::kTooManyUnderWay), "deadlock");
}

}  // namespace
}  // namespace deinfer
