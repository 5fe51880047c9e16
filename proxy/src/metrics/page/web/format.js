// Numbers as people read them: grouped, in thousands (k, M, G) from five digits on, with a unit.

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

/** `1234.5` in thousands, with three digits: `["1.23", "k"]`. */
function scaled(value) {
  const prefixes = ["", "k", "M", "G", "T", "P", "E"];
  let index = 0;
  // 999.5 would be shown as 1000.
  while (value >= 999.5 && index < prefixes.length - 1) {
    value /= 1000;
    index += 1;
  }
  const digits = index === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return [value.toFixed(digits), prefixes[index]];
}

/** A number of things: `9,999`, `12.3k`. */
function formatCount(value) {
  return value < 10_000 ? grouped.format(value) : scaled(value).join("");
}

/** All digits of a number: `12,345,678`. */
function formatExact(value) {
  return grouped.format(value);
}

/** A number of bytes: `512 B`, `1.23 MB`. */
function formatBytes(value) {
  const [number, prefix] = scaled(value);
  return `${number} ${prefix}B`;
}

/** Bytes per second: `1.23 MB/s`; `0` alone, because a table is full of them. */
function formatRate(value) {
  return value === 0 ? "0" : `${formatBytes(value)}/s`;
}

/** Events per second: `0.3/s`, `1,204/s`. */
function formatPerSecond(value) {
  return `${value > 0 && value < 9.95 ? value.toFixed(1) : formatCount(value)}/s`;
}

/** A span of time by its two largest units: `12 ms`, `4.2 s`, `3 min 20 s`, `2 d 4 h`. */
function formatDuration(milliseconds) {
  if (milliseconds < 1000) return `${Math.max(0, Math.round(milliseconds))} ms`;
  if (milliseconds < 10_000) return `${(milliseconds / 1000).toFixed(1)} s`;
  const seconds = Math.floor(milliseconds / 1000);
  const [days, hours, minutes] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (days > 0) return `${days} d ${hours} h`;
  if (hours > 0) return `${hours} h ${minutes} min`;
  return minutes > 0 ? `${minutes} min ${seconds % 60} s` : `${seconds} s`;
}

/** A moment, in the time zone of the reader. */
function formatMoment(milliseconds) {
  return new Date(milliseconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

/** `1 connection`, `2 connections`. */
function plural(value, one, many = `${one}s`) {
  return `${formatCount(value)} ${value === 1 ? one : many}`;
}
