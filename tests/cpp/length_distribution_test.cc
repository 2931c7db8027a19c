#include "scheduler/length_distribution.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "deinfer/error.h"

namespace deinfer {
namespace {

using Floats = std::vector<float>;

TEST(LengthDistribution, UnknownKnowsNothing) {
  LengthDistribution unknown;
  EXPECT_FALSE(unknown.known());
  EXPECT_EQ(unknown.mean(), 0.0f);
  EXPECT_EQ(unknown.quantile_remaining(0.5, 3), 0.0f);
}

TEST(LengthDistribution, PointIsExact) {
  LengthDistribution point = LengthDistribution::point(57.0f);
  EXPECT_EQ(point.mean(), 57.0f);
  EXPECT_EQ(point.mean_remaining(56), 1.0f);
  EXPECT_EQ(point.mean_remaining(57), 0.0f) << "overrun";
  for (double q : {0.0, 0.3, 1.0}) EXPECT_EQ(point.quantile_remaining(q, 7), 50.0f);
  EXPECT_EQ(LengthDistribution::point(0.25f).mean(), 1.0f);
}

TEST(LengthDistribution, ConditionsOnWhatIsGenerated) {
  LengthDistribution d(Floats{10, 20, 40}, Floats{2, 1, 1});
  EXPECT_EQ(d.mean(), 20.0f);
  EXPECT_EQ(d.mean_remaining(10), 20.0f);
  EXPECT_EQ(d.mean_remaining(25), 15.0f);
  EXPECT_EQ(d.mean_remaining(40), 0.0f);
  EXPECT_EQ(d.quantile_remaining(0.5, 0), 10.0f);
  EXPECT_EQ(d.quantile_remaining(0.51, 0), 20.0f);
  EXPECT_EQ(d.quantile_remaining(0.9, 0), 40.0f);
  EXPECT_EQ(d.quantile_remaining(0.5, 12), 8.0f);
  EXPECT_EQ(d.quantile_remaining(1.0, 12), 28.0f);
}

TEST(LengthDistribution, SortsAndScales) {
  LengthDistribution d(Floats{40, 10, 0.1f}, Floats{30, 10, 0});
  EXPECT_EQ(Floats(d.lengths().begin(), d.lengths().end()), (Floats{1, 10, 40}));
  EXPECT_EQ(Floats(d.probabilities().begin(), d.probabilities().end()), (Floats{0, 0.25f, 0.75f}));
  EXPECT_EQ(d.quantile_remaining(0.0, 0), 10.0f) << "a bin without probability is no quantile";
}

TEST(LengthDistribution, NonsenseIsUnknown) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (float bad : {nan, inf, -inf}) {
    EXPECT_FALSE(LengthDistribution(Floats{bad, 2}, Floats{1, 1}).known()) << bad;
    EXPECT_FALSE(LengthDistribution(Floats{1, 2}, Floats{1, bad}).known()) << bad;
    EXPECT_FALSE(LengthDistribution::point(bad).known()) << bad;
  }
  EXPECT_FALSE(LengthDistribution(Floats{1, 2}, Floats{0, 0}).known());
  EXPECT_FALSE(LengthDistribution(Floats{1, 2}, Floats{-1, 2}).known());
  EXPECT_FALSE(LengthDistribution::point(0.0f).known());
  EXPECT_FALSE(LengthDistribution::point(-3.0f).known());
}

TEST(LengthDistribution, ContradictingSizesThrow) {
  EXPECT_THROW(LengthDistribution(Floats{1, 2}, Floats{1}), Error);
  EXPECT_THROW(LengthDistribution(Floats{}, Floats{}), Error);
  EXPECT_THROW(LengthDistribution(Floats(17, 1.0f), Floats(17, 1.0f)), Error);
}

}  // namespace
}  // namespace deinfer
