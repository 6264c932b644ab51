// Measures of answers against gold labels; no page in here, so that a test can ask it.

/** [low, high]: Wilson's interval of the share correct / total; z = 1.96 makes it a 95 % interval. */
export function wilson(correct, total, z = 1.96) {
  if (!(total >= 1) || correct < 0 || correct > total) throw new Error(`${correct} of ${total} is no share`);
  const share = correct / total,
    spread = (z * z) / total,
    centre = share + spread / 2;
  const half = z * Math.sqrt((share * (1 - share)) / total + spread / (4 * total));
  // for 0 and for all correct, centre and half are equal but for rounding
  return [correct === 0 ? 0 : (centre - half) / (1 + spread), correct === total ? 1 : (centre + half) / (1 + spread)];
}

/** counts[gold][predicted] of pairs of classes. */
export function confusion(pairs, classes) {
  const counts = Array.from({length: classes}, () => new Array(classes).fill(0));
  for (const [gold, predicted] of pairs) counts[gold][predicted] += 1;
  return counts;
}

/** {precision, recall, f1, support} of each class; a share of nothing is null. */
export function scores(counts) {
  return counts.map((row, label) => {
    const right = row[label],
      support = row.reduce((sum, n) => sum + n, 0);
    const said = counts.reduce((sum, other) => sum + other[label], 0);
    return {
      precision: said ? right / said : null,
      recall: support ? right / support : null,
      f1: said + support ? (2 * right) / (said + support) : null,
      support,
    };
  });
}

/** What is left when answers less probable than `threshold` are not given: {sure, total, judged, correct}. */
export function coverage(answers, threshold) {
  const sure = answers.filter(answer => answer.probability >= threshold);
  const judged = sure.filter(answer => answer.gold !== null);
  return {
    sure: sure.length,
    total: answers.length,
    judged: judged.length,
    correct: judged.filter(answer => answer.gold === answer.predicted).length,
  };
}
