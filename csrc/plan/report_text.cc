#include "plan/report_text.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "base/check.h"

namespace deinfer {
namespace {

std::string fixed(double value, int digits) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.*f", digits, value);
  return text.data();
}

std::string milliseconds(double seconds) {
  return fixed(seconds * 1e3, seconds < 0.1 ? 2 : 0) + " ms";
}

std::string gibibytes(double bytes) {
  return fixed(bytes / (1 << 30), bytes < 10e9 ? 2 : 1) + " GiB";
}

std::string percent(double share) { return fixed(100 * share, 0) + " %"; }

/// "decode at batch 16", "prefill of 2048 tokens".
std::string phase_text(const std::string& phase) {
  const std::size_t colon = phase.find(':');
  const std::string number = phase.substr(colon + 1);
  return phase.starts_with("decode") ? "decode at batch " + number
                                     : "prefill of " + number + " tokens";
}

double exchanges_per_layer(const PlanEstimate& plan) {
  return plan.all_reduces + plan.all_gathers + plan.reduce_scatters;
}

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    text += (i == 0 ? "" : i + 1 == parts.size() ? " and " : ", ") + parts[i];
  }
  return text;
}

/// Where the time of one phase differs between two plans, the largest part first.
std::string difference_text(const PlanEstimate& ours, const PlanEstimate& theirs,
                            std::size_t phase) {
  const PhaseEstimate& a = ours.phases[phase];
  const PhaseEstimate& b = theirs.phases[phase];
  struct Part {
    double difference;
    std::string text;
  };
  std::array<Part, 4> parts = {
      Part{a.product_seconds - b.product_seconds, "in the products"},
      Part{a.exchange_seconds - b.exchange_seconds, "in exchanges"},
      Part{a.attention_seconds - b.attention_seconds, "in attention"},
      Part{a.operation_seconds - b.operation_seconds, "for starting operations"},
  };
  // A cause is named only where it works in the direction of its effect.
  auto add_cause = [](Part& part, double own, double other, auto&& text) {
    if ((own - other) * part.difference <= 0) return false;
    part.text += " (" + text(own) + ", " + text(other) + " there)";
    return true;
  };
  add_cause(parts[0], static_cast<double>(ours.weight_bytes),
            static_cast<double>(theirs.weight_bytes),
            [](double bytes) { return gibibytes(bytes) + " of weights per rank"; });
  if (!add_cause(parts[1], exchanges_per_layer(ours), exchanges_per_layer(theirs),
                 [](double n) { return str_cat(std::round(10 * n) / 10, " per layer"); })) {
    add_cause(parts[1], ours.wire_bytes_per_token, theirs.wire_bytes_per_token,
              [](double bytes) { return fixed(bytes / 1e3, 0) + " KB per token"; });
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& x, const Part& y) {
    return std::abs(x.difference) > std::abs(y.difference);
  });
  std::vector<std::string> texts;
  const double largest = std::abs(parts[0].difference);
  for (const Part& part : parts) {
    if (part.difference == 0 || std::abs(part.difference) < 0.05 * largest) continue;
    texts.push_back(milliseconds(std::abs(part.difference)) +
                    (part.difference < 0 ? " less " : " more ") + part.text);
  }
  return join(texts);
}

std::string layout_text(const PlanReport& report) {
  if (report.decode_plan == report.prefill_plan) return report.decode_plan;
  return report.decode_plan + " to decode and " + report.prefill_plan +
         " to prefill, which share their weight layout";
}

}  // namespace

std::string reason_of_choice(const PlanReport& report, const std::vector<RankedLayout>& layouts) {
  std::vector<std::string> mix;
  for (const PhaseChoice& choice : report.choices) {
    if (choice.weight > 0) {
      mix.push_back(phase_text(choice.phase) + " (" + percent(choice.weight) + ")");
    }
  }
  std::string reason = layout_text(report) + ". ";
  if (layouts.size() > 1) {
    const RankedLayout& ours = layouts[0];
    const RankedLayout& next = layouts[1];
    std::size_t decisive = 0;
    double most = 0;
    for (std::size_t i = 0; i < report.choices.size(); ++i) {
      const double ratio = next.best[i]->phases[i].seconds / ours.best[i]->phases[i].seconds;
      const double gain = report.choices[i].weight * (ratio - 1);
      if (i == 0 || gain > most) most = gain, decisive = i;
    }
    const PlanEstimate& a = *ours.best[decisive];
    const PlanEstimate& b = *next.best[decisive];
    const double theirs = b.phases[decisive].seconds;
    const double own = a.phases[decisive].seconds;
    reason += "Over " + join(mix) + ", its steps take on average " + fixed(ours.score, 2) +
              " times those of each phase's fastest layout; the next, " + next.name + ", " +
              fixed(next.score, 2) + ". ";
    if (own < theirs) {
      std::string phase = phase_text(report.choices[decisive].phase);
      phase[0] = phase[0] == 'd' ? 'D' : 'P';
      reason += phase + " takes " + milliseconds(own) + ", " + percent(1 - own / theirs) +
                " less than with " + b.plan + " (" + milliseconds(theirs) +
                "): " + difference_text(a, b, decisive) + ".";
    } else {
      reason += "Both take the same time.";
    }
  } else {
    reason += "No other weight layout fits.";
  }
  std::vector<std::string> excluded;
  for (const PlanEstimate& plan : report.plans) {
    if (!plan.fits) {
      excluded.push_back(plan.plan + " (" + gibibytes(static_cast<double>(plan.weight_bytes)) +
                         " of weights)");
    }
  }
  if (!excluded.empty()) {
    reason += " Not in " + gibibytes(static_cast<double>(report.memory_bytes)) +
              " per rank: " + join(excluded) + ".";
  }
  return reason;
}

std::string reason_nothing_fits(const std::vector<PlanEstimate>& plans, std::int64_t kv_tokens,
                                std::uint64_t memory_bytes) {
  const PlanEstimate* smallest = nullptr;
  double least = 0;
  for (const PlanEstimate& plan : plans) {
    const double bytes =
        static_cast<double>(plan.weight_bytes) +
        static_cast<double>(plan.kv_bytes_per_token) * static_cast<double>(kv_tokens);
    if (smallest == nullptr || bytes < least) smallest = &plan, least = bytes;
  }
  return str_cat("No plan fits: ", smallest->plan, " needs the least, ", gibibytes(least),
                 " per rank (", gibibytes(static_cast<double>(smallest->weight_bytes)),
                 " of weights and the KV cache of ", kv_tokens, " tokens), and a rank has ",
                 gibibytes(static_cast<double>(memory_bytes)), ".");
}

}  // namespace deinfer
