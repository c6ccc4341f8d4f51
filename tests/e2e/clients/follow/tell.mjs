// One JSON line for each thing that an application would see.
export const tell = (what) => console.log(JSON.stringify(what));
