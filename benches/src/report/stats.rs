//! Statistics over rounds.

/// The values of a metric over the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    /// Median of the values.
    pub(super) median: f64,
    /// The smallest.
    pub(super) min: f64,
    /// The largest.
    pub(super) max: f64,
    /// Median of the ratios to the reference in the same round, because a disturbance in a round affects
    /// both.
    pub(super) ratio: Option<f64>,
}

impl Summary {
    /// Summarises the values and those of the reference in the same rounds.
    pub(super) fn new(
        values: impl Iterator<Item = Option<f64>>,
        reference: impl Iterator<Item = Option<f64>>,
    ) -> Option<Self> {
        let pairs: Vec<_> = values.zip(reference).collect();
        let values = sorted(pairs.iter().filter_map(|(value, _)| *value));
        let ratio = |(value, reference): &(Option<f64>, Option<f64>)| {
            reference
                .filter(|reference| *reference > 0.0)
                .zip(*value)
                .map(|(reference, value)| value / reference)
        };
        let ratios = sorted(pairs.iter().filter_map(ratio));
        Some(Self {
            median: median(&values)?,
            min: *values.first()?,
            max: *values.last()?,
            ratio: median(&ratios),
        })
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_rounds() {
        let values = [Some(2.0), None, Some(30.0), Some(8.0)];
        let reference = [Some(1.0), Some(5.0), Some(10.0), None];
        let summary = Summary::new(values.into_iter(), reference.into_iter()).unwrap();
        assert_eq!(summary, Summary { median: 8.0, min: 2.0, max: 30.0, ratio: Some(2.5) });
        assert_eq!(Summary::new([None].into_iter(), [Some(1.0)].into_iter()), None);
    }
}
