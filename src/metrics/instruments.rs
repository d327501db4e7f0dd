//! What the rows of the table are made of.

#![expect(clippy::disallowed_macros, reason = "for the table, which all others name rows of")]

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::OnceLock;

use ::metrics::{Counter, Gauge, Histogram, Label, counter, gauge, histogram};
use ::metrics::{describe_counter, describe_gauge, describe_histogram};

use super::Description;

/// What a row says beside its labels.
pub(super) struct About {
    pub(super) name: &'static str,
    pub(super) text: &'static str,
}

/// What can be done with every row.
pub(super) trait Described {
    fn description(&self) -> Description;
    fn register(&self);
}

/// How something is counted or measured.
pub(crate) trait Instrument: Sized {
    /// What Prometheus calls it.
    const KIND: &'static str;
    /// Whether it is zero as long as nothing has happened.
    const COUNTS: bool;

    fn new(name: &'static str, labels: Vec<Label>) -> Self;
    fn describe(name: &'static str, text: &'static str);
}

/// The labels of a metric.
pub(crate) trait Labels: Copy + 'static {
    /// How many sets of values there are.
    const COUNT: usize;

    /// Which of them this is.
    fn index(self) -> usize;
    /// The name and the value of each label of one of them.
    fn texts(index: usize) -> Vec<(&'static str, &'static str)>;
}

impl Labels for () {
    const COUNT: usize = 1;

    fn index(self) -> usize {
        0
    }

    fn texts(_: usize) -> Vec<(&'static str, &'static str)> {
        Vec::new()
    }
}

impl<A: Labels, B: Labels> Labels for (A, B) {
    const COUNT: usize = A::COUNT * B::COUNT;

    fn index(self) -> usize {
        self.0.index() * B::COUNT + self.1.index()
    }

    fn texts(index: usize) -> Vec<(&'static str, &'static str)> {
        [A::texts(index / B::COUNT), B::texts(index % B::COUNT)].concat()
    }
}

/// A metric whose labels have `N` sets of values.
pub(crate) struct Metric<I, L, const N: usize> {
    about: About,
    handles: [OnceLock<I>; N],
    labels: PhantomData<fn(L)>,
}

impl<I: Instrument, L: Labels, const N: usize> Metric<I, L, N> {
    pub(super) const fn new(about: About) -> Self {
        Metric { about, handles: [const { OnceLock::new() }; N], labels: PhantomData }
    }

    /// The handle for these labels.
    pub(crate) fn of(&self, labels: L) -> &I {
        self.at(labels.index())
    }

    fn at(&self, index: usize) -> &I {
        self.handles[index].get_or_init(|| {
            let labels = L::texts(index).into_iter().map(|(name, value)| Label::new(name, value));
            I::new(self.about.name, labels.collect())
        })
    }
}

/// Without labels it is its one handle.
impl<I: Instrument> Deref for Metric<I, (), 1> {
    type Target = I;

    fn deref(&self) -> &I {
        self.of(())
    }
}

impl<I: Instrument, L: Labels, const N: usize> Described for Metric<I, L, N> {
    fn description(&self) -> Description {
        let mut labels: Vec<(_, Vec<_>)> = Vec::new();
        for (name, value) in (0..N).flat_map(L::texts) {
            match labels.iter_mut().find(|(known, _)| *known == name) {
                Some((_, values)) if values.contains(&value) => {}
                Some((_, values)) => values.push(value),
                None => labels.push((name, vec![value])),
            }
        }
        self.about.description(I::KIND, labels)
    }

    fn register(&self) {
        I::describe(self.about.name, self.about.text);
        if I::COUNTS {
            (0..N).for_each(|index| _ = self.at(index));
        }
    }
}

/// A metric with labels whose values are in the configuration.
pub(crate) struct Open<I, const N: usize> {
    about: About,
    names: [&'static str; N],
    instrument: PhantomData<fn() -> I>,
}

impl<I: Instrument, const N: usize> Open<I, N> {
    pub(super) const fn new(about: About, names: [&'static str; N]) -> Self {
        Open { about, names, instrument: PhantomData }
    }

    /// The handle for these values, which is looked up: keep it where it is used often.
    pub(crate) fn of(&self, values: [&str; N]) -> I {
        let labels = self.names.into_iter().zip(values);
        let labels = labels.map(|(name, value)| Label::new(name, value.to_owned()));
        I::new(self.about.name, labels.collect())
    }
}

impl<I: Instrument, const N: usize> Described for Open<I, N> {
    fn description(&self) -> Description {
        self.about.description(I::KIND, self.names.map(|name| (name, Vec::new())).into())
    }

    fn register(&self) {
        I::describe(self.about.name, self.about.text);
    }
}

impl About {
    fn description(
        &self,
        kind: &'static str,
        labels: Vec<(&'static str, Vec<&'static str>)>,
    ) -> Description {
        Description { name: self.name, kind, labels, text: self.text }
    }
}

impl Instrument for Counter {
    const KIND: &'static str = "counter";
    const COUNTS: bool = true;

    fn new(name: &'static str, labels: Vec<Label>) -> Counter {
        counter!(name, labels)
    }

    fn describe(name: &'static str, text: &'static str) {
        describe_counter!(name, text);
    }
}

impl Instrument for Gauge {
    const KIND: &'static str = "gauge";
    const COUNTS: bool = false;

    fn new(name: &'static str, labels: Vec<Label>) -> Gauge {
        gauge!(name, labels)
    }

    fn describe(name: &'static str, text: &'static str) {
        describe_gauge!(name, text);
    }
}

impl Instrument for Histogram {
    const KIND: &'static str = "histogram";
    const COUNTS: bool = false;

    fn new(name: &'static str, labels: Vec<Label>) -> Histogram {
        histogram!(name, labels)
    }

    fn describe(name: &'static str, text: &'static str) {
        describe_histogram!(name, text);
    }
}

/// A gauge of how many there are, counted up and down.
pub(crate) struct UpDown(Gauge);

impl UpDown {
    pub(crate) fn increment(&self) {
        self.0.increment(1);
    }

    pub(crate) fn decrement(&self) {
        self.0.decrement(1);
    }
}

impl Instrument for UpDown {
    const KIND: &'static str = Gauge::KIND;
    const COUNTS: bool = true;

    fn new(name: &'static str, labels: Vec<Label>) -> UpDown {
        UpDown(Gauge::new(name, labels))
    }

    fn describe(name: &'static str, text: &'static str) {
        Gauge::describe(name, text);
    }
}
