// A transform in JavaScript: replaces the values of some columns by stars.
//
// What a change can do is described in ../../wit/transform.wit; names are in camelCase here, and a
// function that the WIT says can fail throws its reason.

let columns = [];

export function init(config) {
  const settings = JSON.parse(config);
  if (!Array.isArray(settings.columns)) {
    throw "`config.columns` must be a list of column names";
  }
  columns = settings.columns;
}

export function transform(change) {
  for (const name of columns) {
    const value = change.getText(name);
    if (value !== undefined) {
      change.setText(name, "*".repeat(value.length));
    }
  }
  return { tag: "keep" };
}
